"""The engines read the files whose headers we read, in whatever directory and with whatever loader."""

from pathlib import Path

import pytest

from qnext_plugin.checkpoint.headers import read_headers
from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.checkpoint.stored import OTHER_FILES
from tests.support import directories
from tests.support.installed import ENGINE

# The load formats that read the safetensors files of a published checkpoint, or serve what was made of them.
SAFETENSORS = {
    "vllm": {"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer"}
    | {"dummy", "ipc_cache", "modelexpress"},
    "sglang": {"auto", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer"}
    | {"dummy", "ipc_cache", "presharded", "layered", "flash_rl", "remote_instance", "rdma", "local_cached", "private"},
}


def load_formats() -> set[str]:
    if ENGINE == "vllm":
        from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

        return set(_LOAD_FORMAT_TO_MODEL_LOADER)
    from sglang.srt.configs.load_config import LoadFormat

    return {str(load_format.value) for load_format in LoadFormat}


def files_that_the_engine_reads(directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    if ENGINE == "vllm":
        from vllm.config import LoadConfig
        from vllm.model_executor.model_loader import DefaultModelLoader

        _, files, _, _ = DefaultModelLoader(LoadConfig())._prepare_weights(str(directory), None, None, True, None)
        return files
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader

    monkeypatch.setattr("sglang.srt.model_loader.loader.get_server_args", lambda: None)
    _, files, _ = DefaultModelLoader(LoadConfig())._prepare_weights(str(directory), None, False)
    return files


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files") / "source"
    write_random_checkpoint(directory, overrides={"num_hidden_layers": 2, "num_experts": 2})
    return directory


@pytest.mark.parametrize("name", directories.SERVED)
def test_the_engine_reads_the_files_that_we_count(source, tmp_path, monkeypatch, name):
    directory = directories.write(source, tmp_path / "model", directories.SERVED[name])
    expected = {str(info.file) for info in read_headers(directory).values()}
    assert sorted(files_that_the_engine_reads(directory, monkeypatch)) == sorted(expected)


def test_every_load_format_is_known_to_read_safetensors_or_other_files():
    """A new one is to be put here, or into ``OTHER_FILES``, after a look at what its loader reads."""
    assert load_formats() - OTHER_FILES == SAFETENSORS[ENGINE]
