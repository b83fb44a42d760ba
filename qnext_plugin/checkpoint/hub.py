"""Read the safetensors headers of a checkpoint on the Hugging Face hub, from its cache or from the hub itself."""

import json
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from qnext_plugin.checkpoint.headers import (
    INDEX_FILE,
    SINGLE_FILE,
    Both,
    TensorInfo,
    headers_of,
    indexed_files,
    read_directory,
)

Found = tuple[Collection[str], Both | None]


def headers_of_commit(model: str, snapshot: Path, download_dir: str | None) -> Found:
    """Read the headers of a commit from its downloaded files, if these are complete, otherwise from the hub.

    ``snapshot`` is its directory in the hub's cache, which has the configuration; weights may be in ``download_dir``.
    Returns the names of the files and what ``read_directory`` returns, which is None without safetensors files.
    """
    from huggingface_hub.errors import HfHubHTTPError

    for directory in (Path(download_dir, *snapshot.parts[-3:]) if download_dir else snapshot, snapshot):
        if _is_downloaded(directory):
            return os.listdir(directory), read_directory(directory)
    try:
        return _asked_once(model, snapshot.name)
    except Exception as e:
        if not isinstance(e, HfHubHTTPError.__bases__):  # `OSError`, and errors of the library that the hub's uses
            raise
        return os.listdir(snapshot), None


def _is_downloaded(directory: Path) -> bool:
    """Return whether the engine, for all that we know without the hub, has nothing to download."""
    from huggingface_hub import constants

    index = directory / INDEX_FILE
    if index.exists():
        return all((directory / file).exists() for file in indexed_files(index))
    return (directory / SINGLE_FILE).exists() or (constants.HF_HUB_OFFLINE and any(directory.glob("*.safetensors")))


def _asked_once(model: str, commit: str) -> Found:
    """Ask the hub once for all processes on this machine, and keep the answer: a commit does not change."""
    from huggingface_hub import cached_assets_path, constants
    from huggingface_hub.utils import WeakFileLock

    folder = cached_assets_path("qnext-plugin", model, commit, assets_dir=constants.HF_ASSETS_CACHE)
    file = folder / "headers.json"
    with WeakFileLock(folder / "lock"):
        if not file.exists():
            part = folder / "part"
            part.write_text(json.dumps(_ask(model, commit)))
            part.rename(file)
    known = json.loads(file.read_bytes())
    headers = {
        name: {n: TensorInfo(tuple(shape), dtype, Path(name)) for n, (shape, dtype) in tensors.items()}
        for name, tensors in known["headers"].items()
    }
    return known["files"], headers_of(model, headers, known["indexed"], headers.__getitem__) if headers else None


def _ask(model: str, commit: str) -> Mapping[str, Any]:
    from huggingface_hub import HfApi, hf_hub_download

    files = HfApi().list_repo_files(model, revision=commit)
    present = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    indexed = None
    if INDEX_FILE in files:
        indexed = sorted(indexed_files(Path(hf_hub_download(model, INDEX_FILE, revision=commit))))
    with ThreadPoolExecutor(8) as pool:
        headers = dict(zip(present, pool.map(partial(_ask_header, model, commit), present), strict=True))
    return {"files": files, "indexed": indexed, "headers": headers}


def _ask_header(model: str, commit: str, file: str) -> Mapping[str, Any]:
    from huggingface_hub import HfApi

    tensors = HfApi().parse_safetensors_file_metadata(model, file, revision=commit).tensors
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def uses_modelscope() -> bool:
    """Return whether an engine takes names from ModelScope instead of the hub."""
    return any(os.environ.get(f"{engine}_USE_MODELSCOPE", "").lower() in ("1", "true") for engine in ("VLLM", "SGLANG"))


def modelscope_directory(model: str, revision: str | None) -> Path | None:
    """Return the directory of a downloaded model; None if it is not there or has still to be completed."""
    try:
        download = import_module("modelscope.hub.snapshot_download").snapshot_download
        directory = Path(download(model, revision=revision, local_files_only=True))
    except Exception:  # not installed, or of a type that differs between versions
        return None
    return directory if _is_downloaded(directory) else None
