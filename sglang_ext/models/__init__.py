"""The package that SGLang's model registry reads; each module lists its classes in ``EntryClass``."""
