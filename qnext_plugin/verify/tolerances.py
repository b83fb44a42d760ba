"""The tolerances for a served model's log-probabilities; the tests use the same table."""

# For whole distributions of any checkpoint in float32, compared with float32 `transformers`, which itself is up to
# 2.3e-5 off from float64 if the weights are trained (the demo checkpoint).
LOGPROB_FLOAT32 = 1e-4

# For small random checkpoints, by engine. On these `transformers` is up to 1e-5 off from float64.
SERVED_LOGPROB_FLOAT32 = {"vllm": 1e-4, "sglang": 1e-5}

# In bfloat16, the largest error and the mean error without the worst tenth of positions are divided by those of
# `transformers` in bfloat16 on the same tokens. The ratios may be this large.
LOGPROB_BFLOAT16_RATIO = 1.2
