"""How far a served model's log-probabilities may be off; the tests hold themselves to the same table."""

# Whole distributions in float32 against float32 `transformers`, of any checkpoint. That is itself up to 2.3e-5 from
# float64 where the weights are trained (the demo checkpoint).
LOGPROB_FLOAT32 = 1e-4

# Of small random checkpoints, by engine. There `transformers` is up to 1e-5 from float64.
SERVED_LOGPROB_FLOAT32 = {"vllm": 1e-4, "sglang": 1e-5}

# In bfloat16: largest error, and mean error, divided by those of `transformers` in bfloat16 on the same tokens.
LOGPROB_BFLOAT16_RATIO = 1.2
