"""The code that verify, bench and doctor run inside SGLang's process."""
