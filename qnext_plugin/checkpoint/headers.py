"""Read the safetensors headers of a checkpoint, which describe its tensors, without reading weights."""

import glob
import json
import shlex
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
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


Both = tuple[dict[str, TensorInfo], dict[str, TensorInfo]]
"""The headers of the files that the engines load, and of those that they leave unread."""


def describe(tensor: torch.Tensor) -> TensorInfo:
    """Describe a tensor that comes from no file as a header would."""
    return TensorInfo(tuple(tensor.shape), _STORED_NAMES.get(tensor.dtype, str(tensor.dtype)), Path())


def read_headers(path: str | Path) -> dict[str, TensorInfo]:
    """Read the safetensors headers of the files that the engines load from a local directory; no weight is read.

    Raises ``ValueError`` if there are none, if one is missing, truncated or unreadable, or if a tensor is in two files.
    """
    return read_directory(Path(path))[0]


def read_directory(directory: Path) -> Both:
    """Return the headers of the files that the engines load, and of those that they leave unread."""
    index = directory / INDEX_FILE
    return _read_files(directory, indexed_files(index) if index.exists() else None)


def headers_of(
    where: str,
    present: Collection[str],
    indexed: Collection[str] | None,
    read: Callable[[str], Mapping[str, TensorInfo]],
) -> Both:
    """Return the headers of the files that the engines load, and of those that they leave unread.

    Both engines load the files that the index names, or all of them without one. They load every tensor of a file,
    whether the index has it or not.
    """
    loaded = sorted(present if indexed is None else indexed)
    if absent := sorted({*loaded} - {*present}):
        names = listing(f"{where}: {INDEX_FILE} names files that are not there:", absent)
        raise ValueError(f"{names}; download them, or, if all weights are in other files here, {index_advice(where)}")
    if not loaded:
        raise ValueError(f"{where}: no *.safetensors files found, expected a checkpoint; download it again")
    headers: dict[str, TensorInfo] = {}
    unread: dict[str, TensorInfo] = {}
    for file in loaded:
        found = read(file)
        check_distinct(where, headers, found)
        headers |= found
    for file in sorted({*present} - {*loaded}):
        with suppress(ValueError):  # left over from a download, perhaps; no engine reads it
            unread |= read(file)
    if any(info.file.name == SINGLE_FILE for info in unread.values()):  # either may be the stale one
        check_distinct(where, headers, unread)
    return headers, unread


def check_distinct(where: str, headers: Mapping[str, TensorInfo], others: Mapping[str, TensorInfo]) -> None:
    """Raise ``ValueError`` if two files hold the same tensor."""
    if both := sorted(headers.keys() & others.keys()):
        files = f"{headers[both[0]].file.name} and {others[both[0]].file.name}"
        raise ValueError(
            f"{where}: {files} hold {len(both)} of the same tensors, such as {both[0]}; delete the files that are stale"
        )


def index_advice(where: str | Path) -> str:
    """Return what to do about an index that does not fit the files of a directory."""
    return f"write a new index: qnext checkpoint index {shlex.quote(str(where))}"


def indexed_files(index: Path) -> set[str]:
    """Return the names of the files that an index names."""
    try:
        files = json.loads(index.read_bytes())["weight_map"].values()
        if not all(isinstance(file, str) for file in files):
            raise TypeError("weight_map holds something other than file names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{index}: not a safetensors index ({type(e).__name__}: {e}); download it again") from e
    return set(files)


def write_index(directory: Path) -> None:
    """Write the index of all safetensors files in a directory, over one that is there.

    Raises ``ValueError`` as ``read_headers`` does.
    """
    headers, _ = _read_files(directory, None)
    index = {"metadata": {}, "weight_map": {name: info.file.name for name, info in sorted(headers.items())}}
    part = directory / f"{INDEX_FILE}.part"
    part.write_text(json.dumps(index, indent=2) + "\n")
    part.replace(directory / INDEX_FILE)  # which may be a link into a cache


def _read_files(directory: Path, indexed: Collection[str] | None) -> Both:
    names = glob.glob("*.safetensors", root_dir=directory)  # not Path.glob, which finds hidden files too
    present = [name for name in names if (directory / name).is_file()]
    return headers_of(str(directory), present, indexed, lambda name: _read_header(directory / name))


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
