"""What verify, bench and doctor do inside SGLang's process."""
