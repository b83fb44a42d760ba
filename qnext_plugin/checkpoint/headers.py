"""Read the safetensors headers of a checkpoint, which describe its tensors, without reading weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qnext_plugin.checkpoint.listing import listing

Shape = tuple[int, ...]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_STORED_NAMES = DTYPE_NAMES | {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


@dataclass(frozen=True)
class TensorInfo:
    """The description of a tensor in a safetensors header. ``dtype`` is the format's name, such as ``BF16``."""

    shape: Shape
    dtype: str
    file: Path


def describe(tensor: torch.Tensor) -> TensorInfo:
    """Describe a tensor that comes from no file as a header would."""
    return TensorInfo(tuple(tensor.shape), _STORED_NAMES.get(tensor.dtype, str(tensor.dtype)), Path())


def read_headers(path: str | Path) -> dict[str, TensorInfo]:
    """Read the safetensors headers of a local checkpoint directory; no weight is read.

    Raises ``ValueError`` if there are no safetensors files, if one is missing, truncated or unreadable, if a tensor is
    in two shards, or if the index and the shards disagree.
    """
    directory = Path(path)
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.exists() and index.exists():
        raise ValueError(f"{directory}: holds both {SINGLE_FILE} and {INDEX_FILE}; delete the one that is stale")
    if single.exists():
        return _read_header(single)
    if not index.exists():
        raise ValueError(f"{directory}: expected a local directory with {SINGLE_FILE} or {INDEX_FILE}, found neither")
    weight_map = _read_weight_map(index)
    files = sorted(set(weight_map.values()))
    absent = [f for f in files if not (directory / f).is_file()]
    if absent:
        raise ValueError(f"{listing(f'{index}: missing shards:', absent)}; download them again")
    headers: dict[str, TensorInfo] = {}
    for file in files:
        shard = _read_header(directory / file)
        duplicates = sorted(headers.keys() & shard.keys())
        if duplicates:
            found = f"{file} repeats tensors of {headers[duplicates[0]].file.name}"
            raise ValueError(listing(f"{directory}: {found}:", duplicates) + "; write the checkpoint again")
        headers |= shard
    disagree = sorted(
        n for n in weight_map.keys() | headers.keys() if n not in headers or weight_map.get(n) != headers[n].file.name
    )
    if disagree:
        raise ValueError(listing(f"{index}: disagrees with the shards on", disagree) + "; download both again")
    return headers


def is_complete(directory: Path) -> bool:
    """Return whether a directory has the file of a single-file checkpoint, or all files that its index names."""
    if (directory / SINGLE_FILE).exists():
        return True
    index = directory / INDEX_FILE
    return index.exists() and all((directory / file).exists() for file in _read_weight_map(index).values())


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("weight_map holds something other than file names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{index}: not a safetensors index ({type(e).__name__}: {e}); download it again") from e
    return dict(weight_map)


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """Parse one file, which has 8 bytes of little-endian header length, the JSON header and the data."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{file}: {size} bytes do not hold a safetensors header; download it again")
        raw = f.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        infos = {name: TensorInfo(tuple(t["shape"]), t["dtype"], file) for name, t in header.items()}
        if not all(
            isinstance(i.dtype, str) and all(type(n) is int and n >= 0 for n in i.shape) for i in infos.values()
        ):
            raise TypeError("a dtype that is no name or a shape that is no list of sizes")
        end = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as e:
        raise ValueError(f"{file}: unreadable safetensors header ({type(e).__name__}: {e}); download it again") from e
    if end > size:
        raise ValueError(f"{file}: truncated, {size} bytes found, {end} expected; download it again")
    return infos
