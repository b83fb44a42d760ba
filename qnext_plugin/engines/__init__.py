"""Start an engine in a separate process, and talk to it."""
