"""How far a served model's log-probabilities may be off; the tests hold themselves to the same table."""

# Whole distributions in float32 against float32 `transformers`, by engine. That is itself up to 1e-5 from float64.
SERVED_LOGPROB_FLOAT32 = {"vllm": 1e-4, "sglang": 1e-5}

# That is for random weights, whose log-probabilities end here. Trained weights have larger logits, which float32 resolves
# in proportion: where they reach to -36, as the demo checkpoint's do, `transformers` is 2.3e-5 from float64.
LOWEST_RANDOM = -8.0

# In bfloat16: largest error, and mean error, divided by those of `transformers` in bfloat16 on the same tokens.
LOGPROB_BFLOAT16_RATIO = 1.2


def float32_tolerance(engine: str, lowest: float) -> float:
    """For distributions whose log-probabilities reach down to ``lowest``."""
    return SERVED_LOGPROB_FLOAT32[engine] * max(1.0, lowest / LOWEST_RANDOM)
