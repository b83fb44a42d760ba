"""A checkpoint in a directory as people make one by hand: which files, and which of them an index names."""

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from qnext_plugin.checkpoint.headers import INDEX_FILE, SINGLE_FILE

A, B, M, S = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "mtp.safetensors", SINGLE_FILE
A_AND_B = {"first": A, "second": B}

# The parts of a checkpoint in each file, and the file that an index says each part is in, if there is an index.
Layout = tuple[Mapping[str, str], Mapping[str, str] | None]
WITH_DRAFT: dict[str, Layout] = {
    "shards without an index": ({A: "first", B: "second", M: "draft"}, None),
    "a draft beside a single file": ({S: "first second", M: "draft"}, None),
    "an index of a single file": ({S: "first second draft"}, dict.fromkeys(("first", "second", "draft"), S)),
    "an index that swaps files": ({A: "first", B: "second draft"}, {"first": B, "second": A, "draft": A}),
    "an index without tensors of its files": ({A: "first", B: "second draft"}, A_AND_B),
}
WITHOUT_DRAFT: dict[str, Layout] = {
    "an index of tensors that no file has": ({A: "first", B: "second"}, A_AND_B | {"draft": B}),
    "a draft that the index lacks": ({A: "first", B: "second", M: "draft"}, A_AND_B),
}
SERVED = WITH_DRAFT | WITHOUT_DRAFT
REFUSED: dict[str, Layout] = {
    "a single file beside the index of other files": ({S: "first second draft"}, A_AND_B),
    "an index of a draft that is not there": ({A: "first", B: "second"}, A_AND_B | {"draft": M}),
    "a single file beside shards and their index": (
        {S: "first second draft", A: "first", B: "second draft"},
        A_AND_B | {"draft": B},
    ),
    "a single file beside shards": ({S: "first second draft", A: "first", B: "second draft"}, None),
}


def write(source: Path, target: Path, layout: Layout) -> Path:
    """Write the single-file checkpoint ``source`` to ``target`` in another layout."""
    files, index = layout
    parts = _parts(source / SINGLE_FILE)
    shutil.copytree(source, target, ignore=lambda *_: [SINGLE_FILE])
    for file, names in files.items():
        save_file({n: t for name in names.split() for n, t in parts[name].items()}, target / file)
    if index is not None:
        weight_map = {tensor: file for part, file in index.items() for tensor in parts[part]}
        (target / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


@cache
def _parts(file: Path) -> Mapping[str, Mapping[str, Tensor]]:
    """The draft, and both halves of the trunk."""
    tensors = load_file(file)
    trunk = sorted(name for name in tensors if not name.startswith("mtp."))
    halves = {"first": trunk[::2], "second": trunk[1::2], "draft": sorted(tensors.keys() - set(trunk))}
    return {part: {name: tensors[name] for name in names} for part, names in halves.items()}
