"""What SGLang's model registry reads: each module names a class in ``EntryClass``."""
