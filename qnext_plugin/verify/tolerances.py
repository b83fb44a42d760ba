"""The tolerances for a served model's log-probabilities; the tests use the same table."""

# For whole distributions of any checkpoint in float32, compared with float32 `transformers`, which itself is up to
# 2.3e-5 off from float64 if the weights are trained (the demo checkpoint).
LOGPROB_FLOAT32 = 1e-4

# For small random checkpoints, by engine. On these `transformers` is up to 1e-5 off from float64.
SERVED_LOGPROB_FLOAT32 = {"vllm": 1e-4, "sglang": 1e-5}

# In bfloat16 an engine is held to what `transformers` in bfloat16 is off. The mean error without the worst tenth of
# positions may be this many times as large as on the same tokens, and CHANCE standard errors more. So may the median
# error of any 12 positions in a row, against the error that one of `transformers`' positions in fifty exceeds.
LOGPROB_BFLOAT16_RATIO = 1.2
CHANCE = 4

# Where a choice of experts flips, few positions are off by far more: with as few as 1,400 of the demo checkpoint, the
# largest error of one sample was up to 2.7 times that of another in 999 of 1,000.
LARGEST_BFLOAT16_RATIO = 4
