"""The port of SGLang to CPUs."""
