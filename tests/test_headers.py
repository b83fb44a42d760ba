"""Which files of a checkpoint are read, and what is said of those that cannot be."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qnext_plugin.checkpoint.headers import INDEX_FILE, SINGLE_FILE, read_headers
from qnext_plugin.checkpoint.stored import read_served
from qnext_plugin.cli import main


def write_shards(directory: Path, shards: dict[str, list[str]], weight_map: dict[str, str] | None = None) -> None:
    for file, names in shards.items():
        save_file({name: torch.zeros(2, 3) for name in names}, directory / file)
    listed = {name: file for file, names in shards.items() for name in names}
    index = {"weight_map": listed if weight_map is None else weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index))


ONE, TWO = "one.safetensors", "two.safetensors"


def test_headers_of_shards_and_of_one_file(tmp_path: Path) -> None:
    write_shards(tmp_path, {ONE: ["a.3"], TWO: ["b"]})
    headers = read_headers(tmp_path)
    assert {n: (i.shape, i.dtype, i.file.name) for n, i in headers.items()} == {
        "a.3": ((2, 3), "F32", ONE),
        "b": ((2, 3), "F32", TWO),
    }


@pytest.mark.parametrize(
    ("shards", "weight_map", "message"),
    [
        ({ONE: ["a"]}, {"a": ONE, "b": TWO}, f"names files that are not there: 1: {TWO}; download .* index /"),
        ({ONE: ["a"]}, {"a": ONE, "b": f"../{ONE}"}, "names files that are not there: 1: "),
        ({ONE: ["a", "b"], TWO: ["b"]}, None, f"{ONE} and {TWO} hold 1 of the same tensors, such as b; delete"),
        ({SINGLE_FILE: ["a"], TWO: ["a"]}, {"a": TWO}, f"{TWO} and {SINGLE_FILE} hold 1 of the same tensors"),
        ({ONE: ["a"]}, {"a": 1}, "not a safetensors index"),
        ({ONE: ["a"]}, {}, r"no \*\.safetensors files found"),
    ],
)
def test_bad_index_is_refused(
    shards: dict[str, list[str]], weight_map: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    write_shards(tmp_path, shards, weight_map)
    with pytest.raises(ValueError, match=message):
        read_headers(tmp_path)


def test_a_new_index_names_all_tensors(tmp_path: Path) -> None:
    """Also where the old one is a link, as in the hub's cache, whose target stays as it is."""
    write_shards(tmp_path, {ONE: ["a"], TWO: ["b"]}, {"c": "three"})
    old = (tmp_path / INDEX_FILE).rename(tmp_path / "old")
    (tmp_path / INDEX_FILE).symlink_to(old)
    assert main(["checkpoint", "index", str(tmp_path)]) == 0
    assert json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"] == {"a": ONE, "b": TWO}
    assert read_headers(tmp_path).keys() == {"a", "b"}
    assert json.loads(old.read_text())["weight_map"] == {"c": "three"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes do not hold a safetensors header"),
        (b"\xff" * 100, "100 bytes do not hold"),
        (b"\x04" + b"\0" * 7 + b"{no}", "unreadable safetensors header"),
        (b"\x09" + b"\0" * 7 + b'{"a": {}}', "unreadable safetensors header .KeyError"),
        (None, "truncated, .* found, .* expected"),
    ],
)
def test_bad_file_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(5)}, file)
    file.write_bytes(file.read_bytes()[:-1] if content is None else content)
    with pytest.raises(ValueError, match=message):
        read_headers(tmp_path)


def test_a_file_that_the_index_does_not_name_is_read_by_nobody(tmp_path: Path) -> None:
    """Left over, or damaged; but one loader of vLLM's reads all files."""
    write_shards(tmp_path, {ONE: ["a"], TWO: ["a", "b"]}, {"a": TWO, "b": TWO})
    (tmp_path / "damaged.safetensors").write_bytes(b"x")
    assert {info.file.name for info in read_headers(tmp_path).values()} == {TWO}
    assert read_served(str(tmp_path), None, "auto", None).headers is not None
    with pytest.raises(ValueError, match=f"runai_streamer: {TWO} and {ONE} hold 1 of the same tensors, such as a"):
        read_served(str(tmp_path), None, "runai_streamer", None)
