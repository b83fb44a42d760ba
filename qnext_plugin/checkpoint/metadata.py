"""What a checkpoint is, from its metadata alone: a local directory, or a name on the Hugging Face hub."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnext_plugin.checkpoint.headers import TensorInfo, read_headers
from qnext_plugin.config import read_config


@dataclass(frozen=True)
class Metadata:
    """``config.json`` as it stands, and the safetensors headers where there are any."""

    config: Mapping[str, Any]
    headers: Mapping[str, TensorInfo] | None


def read_metadata(model: str, revision: str | None = None) -> Metadata:
    """No weights are downloaded. ``ValueError`` for what is no model, ``OSError`` where the hub cannot be reached."""
    directory = Path(model)
    if directory.is_dir():
        has_weights = any(directory.glob("*.safetensors"))
        return Metadata(read_config(directory / "config.json"), read_headers(directory) if has_weights else None)
    if model.count("/") != 1 or model.startswith(("/", ".")):
        example = "Qwen/Qwen3-Next-80B-A3B-Instruct"
        raise ValueError(f"{model!r} is neither a local directory nor a name on the hub, such as {example}")
    return _from_hub(model, revision)


def _from_hub(model: str, revision: str | None) -> Metadata:
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
    )

    try:
        config = read_config(Path(hf_hub_download(model, "config.json", revision=revision)))
    except LocalEntryNotFoundError as e:
        raise OSError(
            f"{model}: config.json cannot be fetched, and is not in the hub's cache; is there a network?"
        ) from e
    except HfHubHTTPError as e:
        raise ValueError(f"{model}: {e}") from e
    try:
        files = get_safetensors_metadata(model, revision=revision).files_metadata
    except (NotASafetensorsRepoError, OfflineModeIsEnabled, OSError):
        return Metadata(config, None)
    return Metadata(
        config,
        {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype, Path(file))
            for file, metadata in files.items()
            for name, tensor in metadata.tensors.items()
        },
    )
