"""The one table of tolerances: largest absolute error allowed, by what is compared and in which dtype."""

import torch

# Operators against the float64 recurrent oracle, relative to the largest magnitude of the expected tensor.
OPS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}

# A Gated DeltaNet layer from convolution to gated norm, which in bfloat16 rounds after each of four kernels.
LAYER = {torch.float32: 2e-5, torch.bfloat16: 6e-2}

# Log-probabilities of our reference against float32 transformers.
LOGPROB_FLOAT32 = 1e-4

# transformers a layer at a time against the whole model, log-probabilities in float32.
STREAMED_LOGPROB = 3e-5

# Those of a served model are in qnext_plugin.verify.tolerances, because `qnext verify` applies them as well.

# The same with quantized weights, where `transformers` also rounds the inputs of the layers whose kernels do: of the
# usual errors, because the largest of a hundred positions differs by a third between CPUs.
LOGPROB_QUANTIZED_RATIO = 1.2

# Hidden states, embeddings and class probabilities of a served model against float32 transformers, relative.
SERVED_TENSOR_FLOAT32 = 2e-5


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
