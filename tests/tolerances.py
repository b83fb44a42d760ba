"""The one table of tolerances: largest absolute error allowed, by what is compared and in which dtype."""

import torch

# Operators against the float64 recurrent oracle, relative to the largest magnitude of the expected tensor.
OPS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}

# A Gated DeltaNet layer from convolution to gated norm, which in bfloat16 rounds after each of four kernels.
LAYER = {torch.float32: 2e-5, torch.bfloat16: 6e-2}

# Log-probabilities of our reference against float32 transformers.
LOGPROB_FLOAT32 = 1e-4

# The same of a served model, whole distributions, by engine. transformers is itself up to 1e-5 from float64.
SERVED_LOGPROB_FLOAT32 = {"vllm": 1e-4, "sglang": 1e-5}

# In bfloat16: largest error divided by the one `transformers` itself makes in bfloat16 on the same tokens.
LOGPROB_BFLOAT16_RATIO = 1.2

# The same with quantised weights, where `transformers` also rounds the inputs of the layers whose kernels do.
LOGPROB_QUANTISED_RATIO = 1.3


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "tensor") -> None:
    """Fail naming the largest error and where it is; the error is relative to the largest expected magnitude."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs() / expected.double().abs().max().clamp_min(1e-30)
    assert not error.isnan().any(), f"{what}: NaN at {tuple(error.isnan().nonzero()[0].tolist())}"
    worst = error.argmax()
    where = tuple(int(i) for i in torch.unravel_index(worst, error.shape))
    assert error.max() <= tolerance, f"{what}: error {error.max():.3g} > {tolerance:.3g} at {where}"
