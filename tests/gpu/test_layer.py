"""Every GPU kernel that a Gated DeltaNet layer calls, between its projections, against the float64 oracle."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch

from qnext_plugin.config import GatedDeltaNetDims
from qnext_plugin.kernel_log import KERNELS_RAN
from tests.gpu.turns import Turn

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

QWEN3_NEXT = GatedDeltaNetDims(16, 32, 128, 128)
UNEQUAL = GatedDeltaNetDims(2, 6, 128, 128)
ODD = GatedDeltaNetDims(2, 6, 48, 80)
ODD_UNDER_64 = GatedDeltaNetDims(2, 6, 48, 64)  # which vLLM's prefill kernels take, unlike 48 and 80
SMALL = GatedDeltaNetDims(1, 3, 16, 24)
SMALL_UNDER_32 = GatedDeltaNetDims(1, 3, 20, 24)
BF16, F32 = torch.bfloat16, torch.float32
DTYPES = ((BF16, "float32"), (BF16, "bfloat16"), (F32, "float32"))

Case = tuple[GatedDeltaNetDims, torch.dtype, str, bool]
"""Dimensions, dtype, dtype of the recurrent state, whether batches are padded as for full CUDA graphs."""
SERVED: list[Case] = [(QWEN3_NEXT, BF16, state, graph) for state in ("float32", "bfloat16") for graph in (True, False)]
OTHERS: list[Case] = [
    *((QWEN3_NEXT, F32, "float32", graph) for graph in (True, False)),
    *((dims, *dtypes, graph) for dims, dtypes, graph in product((UNEQUAL, ODD), DTYPES, (True, False))),
    *((ODD_UNDER_64, BF16, state, True) for state in ("float32", "bfloat16")),
]
INTERPRETED: list[Case] = [
    (SMALL_UNDER_32, BF16, "float32", False),
    (SMALL, BF16, "bfloat16", True),
    (SMALL, F32, "float32", True),
]
MARKED: list[tuple[Case, Any]] = [
    *((case, ()) for case in SERVED),
    *((case, pytest.mark.exhaustive) for case in OTHERS),
    *((case, pytest.mark.interpreted) for case in INTERPRETED),
]


def param(case: Case, *num_drafts: int, marks: Any) -> Any:
    dims, dtype, state, graph = case
    heads = f"{dims.num_k_heads}/{dims.num_v_heads}x{dims.head_k_dim}/{dims.head_v_dim}"
    name = f"{heads} {str(dtype)[6:]}, state {state}" + graph * ", full graphs"
    return pytest.param(case, *num_drafts, id=name + "".join(f", {n} drafts" for n in num_drafts), marks=marks)


@pytest.fixture
def make(device: str) -> Callable[..., Any]:
    """A function that makes the ``Layer`` of a case."""

    def made(case: Case, **arguments: Any) -> Any:
        from tests.gpu.layer import Layer

        dims, dtype, state, graph = case
        KERNELS_RAN.clear()
        return Layer(dims, dtype, state_dtype=state, full_graph=graph, device=device, **arguments)

    return made


@pytest.fixture
def lengths(device: str) -> list[int]:
    return [5, 67] if device == "cpu" else [1, 5, 64, 67, 130, 3]


@pytest.fixture
def record(record_property: Callable[[str, Any], None]) -> Callable[..., None]:
    """A function that records a layer's errors and the kernels that ran, all of ``phases`` as it describes them."""

    def recorded(layer: Any, errors: Sequence[float], *phases: str) -> None:
        record_property("error", max(errors))
        record_property("kernels", sorted(KERNELS_RAN))
        described = layer.layer.kernels.describe()
        assert {f"{phase}: {described[phase][0]}" for phase in phases} <= KERNELS_RAN

    return recorded


def grow(layer: Any, lengths: list[int]) -> list[float]:
    """Prefills of ``lengths``, decodes, decodes and new prefills in one batch, chunked prefills, reused slots."""
    old = [layer.request() for _ in lengths]
    errors = [layer.step([Turn(r, n) for r, n in zip(old, lengths, strict=True)])]
    errors.append(layer.step([Turn(r) for r in old]))
    new = layer.request()
    errors.append(layer.step([*(Turn(r) for r in old), Turn(new, lengths[-1])]))
    errors.append(layer.step([*(Turn(r) for r in old[1:]), Turn(new, 3), Turn(old[0], 2)]))
    layer.release(old[0])
    errors.append(layer.step([Turn(old[1]), Turn(layer.request(), 1), Turn(layer.request(), 2)]))
    if layer.full_graph:
        errors.append(layer.step([Turn(r) for r in old[1:]], padded=3))
    return errors


def draft(layer: Any, lengths: list[int]) -> list[float]:
    """Drafts accepted in every number, ragged, with prompts beside them, and in a padded batch."""
    most, rounds = layer.num_drafts, 2 if layer.device == "cpu" else 4
    requests = [layer.request() for _ in lengths]
    errors = [layer.step([Turn(r, n) for r, n in zip(requests, lengths, strict=True)])]
    for i in range(rounds):
        turns = [Turn(r, drafts=most, accepted=1 + (i + j) % (1 + most)) for j, r in enumerate(requests)]
        errors.append(layer.step(turns, padded=2 if layer.full_graph and i == 1 else 0))
    ragged = [Turn(r, drafts=j % (1 + most), accepted=1 + j % (1 + most)) for j, r in enumerate(requests)]
    errors.append(layer.step(ragged))
    new = layer.request()
    turns = [Turn(r, drafts=most, accepted=1 + j % 2) for j, r in enumerate(requests)]
    errors.append(layer.step([*turns, Turn(new, lengths[0])]))
    errors.append(layer.step([Turn(r, drafts=most, accepted=1 + most) for r in [*requests, new]]))
    # A prompt of one token that joins others has placeholders for drafts, and nothing in its slot.
    errors.append(layer.step([Turn(r, drafts=most, accepted=1) for r in [*requests, layer.request()]]))
    errors.append(
        layer.step([*turns[:1], Turn(layer.request(), drafts=most, accepted=1), Turn(layer.request(), lengths[0])])
    )
    return errors


@pytest.mark.parametrize("case", [param(case, marks=marks) for case, marks in MARKED])
def test_prefill_and_decode(make: Any, record: Any, lengths: list[int], case: Case) -> None:
    layer = make(case)
    record(layer, grow(layer, lengths), "prefill", "decode")


@pytest.mark.parametrize(
    ("case", "num_drafts"),
    [
        param(case, num_drafts, marks=marks)
        for case, marks in MARKED
        for num_drafts in ((2,) if case in INTERPRETED else (1, 2, 3, 7))
    ],
)
def test_drafts(make: Any, record: Any, lengths: list[int], case: Case, num_drafts: int) -> None:
    layer = make(case, num_drafts=num_drafts)
    record(layer, draft(layer, lengths), "prefill", "verify")


def test_drafts_where_the_fused_kernel_could_serve_but_does_not(make: Any, record: Any, lengths: list[int]) -> None:
    layer = make((QWEN3_NEXT, BF16, "float32", True), num_drafts=2)
    kernels = layer.layer.kernels
    kernels.obstacle, kernels.fused_mtp_decode = "turned off by the test", False
    record(layer, draft(layer, lengths), "prefill", "verify")


@pytest.mark.parametrize("backend", ["flashinfer", "auto"])
def test_prefill_backends(make: Any, record: Any, lengths: list[int], backend: str) -> None:
    """They are compiled on first use, which may take long or have no compiler."""
    layer = make((QWEN3_NEXT, BF16, "float32", False), backend=backend)
    record(layer, grow(layer, lengths), "prefill", "decode")


@pytest.mark.interpreted
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_flashinfer_reads_and_writes_states_in_the_cache(
    make: Any, lengths: list[int], num_drafts: int, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Its kernel is replaced by torch where there is no GPU."""
    if device == "cpu":
        from tests.gpu import flashinfer_stub

        flashinfer_stub.install(monkeypatch)
    case = (GatedDeltaNetDims(1, 2, 128, 128), BF16, "bfloat16", False)
    layer = make(case, backend="flashinfer", num_drafts=num_drafts)
    assert layer.layer.kernels.describe()["prefill"] == ("triton, flashinfer", "")
    (draft if num_drafts else grow)(layer, lengths)
    assert "prefill: triton, flashinfer" in KERNELS_RAN


@pytest.mark.interpreted
def test_heads_that_flashinfer_does_not_take(make: Any, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """vLLM's metadata then lacks what its own kernels need; it is computed once in a step, not in each layer."""
    from tests.gpu import flashinfer_stub
    from vllm_ext import gpu_prefill

    if device != "cpu":
        pytest.skip("a GPU may choose another backend")
    flashinfer_stub.install(monkeypatch)
    computed, prepare = [], gpu_prefill.prepare_chunk_indices
    monkeypatch.setattr(gpu_prefill, "prepare_chunk_indices", lambda *args: computed.append(args) or prepare(*args))
    layer = make((SMALL_UNDER_32, BF16, "float32", False))
    reason = "FlashInfer takes heads of 128, not 20 and 24"
    assert layer.layer.kernels.describe()["prefill"] == ("triton, triton", reason)
    layer.step([Turn(layer.request(), 5), Turn(layer.request(), 67)])
    assert len(computed) == 1


@pytest.mark.interpreted
def test_the_gate_is_not_copied(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ext import gpu_kernels

    strides, norm = [], gpu_kernels.layer_norm_fwd
    monkeypatch.setattr(
        gpu_kernels, "layer_norm_fwd", lambda *args, z, **rest: (strides.append(z.stride()), norm(*args, z=z, **rest))
    )
    layer = make(INTERPRETED[0])
    layer.step([Turn(layer.request(), 3)])
    dims = layer.dims
    assert strides == [(dims.conv_dim + dims.value_dim, 1)]


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("dims", "dtype", "serves", "obstacle"),
    [
        (QWEN3_NEXT, BF16, "triton", ""),
        (ODD_UNDER_64, BF16, "triton", ""),
        (ODD, BF16, "torch", "does not compile for heads of 48 and 80"),
        (GatedDeltaNetDims(2, 6, 64, 128), torch.float16, "torch", "does not compile for heads of 64 and 128"),
        (QWEN3_NEXT, F32, "torch", "no float32"),
    ],
)
def test_which_prefill_serves_and_why(
    make: Any, dims: GatedDeltaNetDims, dtype: torch.dtype, serves: str, obstacle: str
) -> None:
    kernels, reason = make((dims, dtype, "float32", False)).layer.kernels.describe()["prefill"]
    assert kernels == f"triton, {serves}"
    assert obstacle in reason and bool(obstacle) == bool(reason)
