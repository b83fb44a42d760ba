"""Whatever is in a checkpoint's files and tensors, the answer is a result or a ``ValueError`` that says where."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qnext_plugin.checkpoint.coverage import check_coverage
from qnext_plugin.checkpoint.headers import TensorInfo, read_headers
from qnext_plugin.checkpoint.layouts import LAYOUTS, inverse_row_order, regroup, row_order, section_sizes, ungroup
from qnext_plugin.checkpoint.schema import expected_tensors
from qnext_plugin.config import GatedDeltaNetDims, QNextConfig
from tests.support.configs import PUBLISHED

DEEP = b"[" * 5_000  # deeper than the JSON parser goes
LONG = b"9" * 5_000  # more digits than int() takes

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3), max_leaves=8
)
sizes = st.integers(-1, 40) | st.integers()
tensors = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I32", "?"]) | anything,
        "shape": st.lists(sizes, max_size=3) | anything,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | anything,
    },
)


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def fuzz(examples: int) -> Callable[[Any], Any]:
    return settings(max_examples=examples, deadline=None)


def reads_or_refuses(read: Callable[[Path], Any], files: dict[str, bytes]) -> Any:
    """The result, or None for a ``ValueError`` that names the file."""
    with tempfile.TemporaryDirectory() as directory:
        for name, content in files.items():
            (Path(directory) / name).write_bytes(content)
        try:
            return read(Path(directory))
        except ValueError as e:
            assert str(e).startswith((directory, "config.json: ")), e
            return None


@fuzz(200)
@given(st.binary(max_size=40) | anything.map(encoded))
@example(DEEP)
@example(LONG)
@example(b'{"vocab_size": ' + LONG + b"}")
def test_config_file(content: bytes) -> None:
    reads_or_refuses(QNextConfig.from_pretrained, {"config.json": content})


@fuzz(300)
@given(
    (st.dictionaries(st.text(max_size=8), tensors | anything, max_size=3) | anything).map(encoded)
    | st.binary(max_size=40),
    st.integers(0, 60),
    st.none() | st.integers(0, 2**64 - 1),
)  # fmt: skip
@example(DEEP, 0, None)
@example(b'{"a": ' + LONG + b"}", 0, None)
def test_safetensors_header(header: bytes, data: int, length: int | None) -> None:
    length = len(header) if length is None else length
    content = length.to_bytes(8, "little") + header + bytes(data)
    headers = reads_or_refuses(read_headers, {"model.safetensors": content})
    for name, info in (headers or {}).items():
        assert isinstance(name, str) and isinstance(info.dtype, str)
        assert all(type(n) is int and n >= 0 for n in info.shape)


@fuzz(200)
@given(st.dictionaries(st.text(max_size=8), anything, max_size=3) | anything, st.booleans())
@example({"a": "../outside"}, True)
@example({"a": "."}, True)
@example({"a": "nul\0"}, True)
@example({"a": "one.safetensors"}, True)
def test_safetensors_index(weight_map: Any, nested: bool) -> None:
    index = encoded({"weight_map": weight_map} if nested else weight_map)
    reads_or_refuses(
        read_headers, {"model.safetensors.index.json": index, "one.safetensors": b"\x02" + bytes(7) + b"{}"}
    )


CONFIG = QNextConfig.from_dict(PUBLISHED | {"num_experts": 3})
EXPECTED = {name: TensorInfo(shape, "BF16", Path("f")) for name, shape in expected_tensors(CONFIG).items()}
segments = st.sampled_from(
    ["model", "mtp", "layers", "mlp", "experts", "linear_attn", "self_attn", "q_proj", "weight", "weight_scale"]
) | st.integers(0, 10**9).map(str) | st.text(max_size=3)  # fmt: skip
names = st.sampled_from(sorted(EXPECTED)) | st.lists(segments, min_size=1, max_size=6).map(".".join)
infos = st.builds(
    TensorInfo,
    st.lists(st.integers(0, 100), max_size=3).map(tuple),
    st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "?"]),
    st.just(Path("f")),
)


@fuzz(150)
@given(st.sets(st.sampled_from(sorted(EXPECTED)), max_size=3), st.dictionaries(names, infos, max_size=3))
@example(set(), {f"model.layers.{LONG.decode()}.x": EXPECTED["model.norm.weight"]})
def test_coverage_accepts_what_is_complete_and_names_what_is_not(
    removed: set[str], added: dict[str, TensorInfo]
) -> None:
    headers = {name: info for name, info in EXPECTED.items() if name not in removed} | added
    try:
        check_coverage(CONFIG, headers)
    except ValueError as e:
        routers = ("the number of experts differs between layers", "the routers have")
        if str(e).startswith(routers):
            assert any(name.endswith(".mlp.gate.weight") for name in added)
            return
        assert str(e).startswith("checkpoint does not match config.json:\n")
        return
    wrong = {n for n, info in headers.items() if info.dtype in ("F32", "BF16") and n in EXPECTED} & added.keys()
    assert all(headers[n].shape == EXPECTED[n].shape for n in wrong)
    assert all(name in headers or name.rpartition(".")[0] + ".qweight" in headers for name in removed)


dims = st.builds(
    lambda k, ratio, *head_dims: GatedDeltaNetDims(k, k * ratio, *head_dims),
    *(st.sampled_from(x) for x in ((1, 2, 3, 4, 8), (1, 2, 3, 4), (1, 5, 8, 16), (1, 6, 8, 24))),
)
kinds = st.sampled_from(["qkvz", "ba"])


@fuzz(100)
@given(dims, kinds, st.integers(1, 200))
def test_row_orders_are_inverse_permutations_or_refused(dims: GatedDeltaNetDims, kind: Any, granularity: int) -> None:
    try:
        order = row_order(dims, kind, granularity)
    except ValueError as e:
        assert f"multiples of {granularity}" in str(e)
        return
    inverse = inverse_row_order(dims, kind, granularity)
    assert torch.equal(order[inverse], torch.arange(sum(section_sizes(dims, kind)) // granularity))


@fuzz(100)
@given(dims, kinds, st.data())
def test_layouts_survive_a_round_trip_on_every_shard(dims: GatedDeltaNetDims, kind: Any, data: Any) -> None:
    """Flattening commutes with sharding by whole groups, whatever the stored tensor's granularity."""
    divisors = [n for n in range(1, dims.num_k_heads + 1) if dims.num_k_heads % n == 0]
    tp_size = data.draw(st.sampled_from(divisors))
    rows = sum(section_sizes(dims, kind))
    packed = [
        (name, torch.randint(-(2**31), 2**31, (3, rows // n), dtype=torch.int32))
        for name, n in (("qweight", 8), ("qzeros", 8), ("qzeros", 4))
        if rows % n == 0
    ]
    plain = [("weight", torch.arange(rows * 2).view(rows, 2)), ("bias", torch.arange(rows))]
    scales = [("scales", torch.arange(rows * 3).view(3, rows))]
    suffix, stored = data.draw(st.sampled_from(plain + scales + packed))
    try:
        flat = ungroup(stored, dims, kind, suffix)
    except ValueError as e:  # words that hold rows of two sections
        assert stored.dtype == torch.int32 and "in a key-head group, expected multiples of" in str(e)
        return
    assert flat.shape == stored.shape and torch.equal(regroup(flat, dims, kind, suffix), stored)
    if stored.dtype == torch.int32:
        return
    axis, sections = (1, section_sizes(dims, kind)) if suffix == "scales" else (0, section_sizes(dims, kind))
    for rank in range(tp_size):
        merged = torch.cat([section.chunk(tp_size, axis)[rank] for section in flat.split(sections, axis)], axis)
        groups = stored.chunk(tp_size, axis)[rank]
        assert torch.equal(merged, ungroup(groups, dims.shard(tp_size), kind, suffix))


@fuzz(300)
@given(
    dims,
    kinds,
    st.sampled_from(list(LAYOUTS)) | st.text(),
    st.lists(st.integers(0, 200), max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.int8, torch.uint8]),
)
def test_any_tensor_is_permuted_or_refused(
    dims: GatedDeltaNetDims, kind: Any, suffix: str, shape: list[int], dtype: torch.dtype
) -> None:
    tensor = torch.zeros(()).to(dtype).expand(shape)
    for move in (ungroup, regroup):
        try:
            moved = move(tensor, dims, kind, suffix)
        except ValueError as e:
            assert "in_proj_" in str(e) or "expected one of" in str(e)
        else:
            assert moved.shape == tensor.shape and moved.dtype == dtype
