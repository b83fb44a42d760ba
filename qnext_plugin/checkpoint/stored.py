"""Read the metadata of a checkpoint in a local directory or on the Hugging Face hub."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from qnext_plugin.checkpoint.formats import Leaves, dequantize
from qnext_plugin.checkpoint.headers import INDEX_FILE, SINGLE_FILE, TensorInfo, is_complete, read_headers
from qnext_plugin.checkpoint.layouts import FP8_BLOCK, KINDS, can_ungroup
from qnext_plugin.checkpoint.merged import MERGED, modules_of
from qnext_plugin.checkpoint.quantization import (
    SCALES,
    check_quantization,
    is_quantized,
    of_one_row,
    stored_modules,
)
from qnext_plugin.checkpoint.schema import check_coverage, weight_shapes
from qnext_plugin.config import QNextConfig, read_config

MODELOPT_FILE = "hf_quant_config.json"  # ModelOpt's file for the settings that others write to config.json
OTHER_FILES = frozenset(
    (
        *("pt", "npcache", "tensorizer", "sharded_state", "runai_streamer_sharded", "presharded", "mistral"),
        *("gguf", "bitsandbytes", "expert_pack", "jax", "remote"),
    )
)
"""These load formats of the engines read other files than the safetensors files of a published checkpoint."""

_ROW_PARALLEL = ("o_proj", "out_proj", "down_proj")


@dataclass(frozen=True)
class Checkpoint:
    """The metadata of a checkpoint, known before a weight is read.

    ``config`` is the content of ``config.json``. ``headers`` are None if there are no safetensors files or their
    headers cannot be read. ``quantization`` is the checkpoint's description of its quantization.
    """

    config: Mapping[str, Any]
    headers: Mapping[str, TensorInfo] | None
    quantization: Mapping[str, Any] | None

    @cached_property
    def quantized(self) -> Mapping[str, Leaves] | None:
        """The stored tensors of all modules; None if the checkpoint is not quantized or has no headers."""
        return None if self.quantization is None or self.headers is None else stored_modules(self.headers)

    def check(self, config: QNextConfig, mtp: Literal["required", "optional"] = "optional") -> None:
        """Raise ``ValueError`` if the headers do not fit the configuration or each other."""
        assert self.headers is not None
        check_coverage(config, self.headers, mtp=mtp)
        check_quantization(self.headers, self.quantization, weight_shapes(config))

    def parts(self, layer: str, num_experts: int) -> dict[str, Leaves]:
        """Return the stored modules of a layer; the result is empty if none of them is quantized.

        The name of a draft's layer contains ``mtp``.
        """
        stored = self.quantized or {}
        parts = {name: stored[name] for name in modules_of(layer, num_experts) if name in stored}
        return parts if any(is_quantized(leaves) for leaves in parts.values()) else {}

    def obstacle(self, parts: Mapping[str, Leaves], config: QNextConfig, tp_size: int) -> str | None:
        """Return why a layer's ``parts`` cannot be served as stored, as far as this is known without the engine."""
        merged = {name: leaves for name, leaves in parts.items() if ".experts." not in name}
        if len({of_one_row(leaves) for leaves in merged.values()}) > 1:
            return "its parts are stored in different ways"
        for name, leaves in parts.items():
            last = name.rpartition(".")[2]
            if last in KINDS:
                shapes = {leaf: info.shape for leaf, info in leaves.items()}
                if not can_ungroup(shapes, config.gdn, KINDS[last]):
                    return "a packed word or block holds rows of several sections"
            elif ".experts." not in name:
                ranks = min(tp_size, config.num_key_value_heads) if last in ("k_proj", "v_proj") else tp_size
                # A layer that is stored whole has several sections, of which each rank takes a part.
                sections = MERGED[last].num_sections if last in MERGED else 1
                merged = len(parts) > 1 or sections > 1
                if not _splits(leaves, ranks * sections, by_inputs=last in _ROW_PARALLEL, merged=merged):
                    return (
                        f"a block or group with one scale would be split among {tp_size} ranks or joined with another's"
                    )
        return None

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Compute a quantized module's weight, float32 ``[rows, in]``, from its tensors by the names' last segment."""
        assert self.quantization is not None
        return dequantize(tensors, self.quantization)


def _splits(leaves: Leaves, ranks: int, by_inputs: bool, merged: bool) -> bool:
    """Return whether each rank's share of a module is a whole number of blocks or groups of inputs.

    The engines check this only for some methods and layers; for others they fail while loading.
    """
    scale = next(leaves[name].shape for name in SCALES if name in leaves)
    weight = leaves["weight"].shape if "weight" in leaves else ()
    if len(scale) == 2 and weight and scale[0] != weight[0]:  # blocks
        return (ranks == 1 and not merged) or weight[by_inputs] % (FP8_BLOCK * ranks) == 0
    if len(scale) == 2 and by_inputs:
        groups = scale[0] if "scales" in leaves else scale[1]
        return groups == 1 or groups % ranks == 0
    return True


def read_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Read the metadata of a local directory or a name on the hub; no weights are downloaded.

    Raises ``ValueError`` if ``model`` is not a model, and ``OSError`` if the hub cannot be reached.
    """
    directory = Path(model)
    if directory.is_dir():
        return _read_directory(directory, read_config(directory / "config.json"))
    if not _is_hub_name(model):
        example = "Qwen/Qwen3-Next-80B-A3B-Instruct"
        raise ValueError(f"{model!r} is neither a local directory nor a name on the hub, such as {example}")
    return _read_hub(model, revision, None)


def read_served(model: str, revision: str | None, load_format: str, download_dir: str | None) -> Checkpoint:
    """Read the metadata of the checkpoint that an engine loads, of whatever kind it is.

    There are no headers if the engine loads no safetensors files. Raises ``ValueError`` for a local checkpoint that
    cannot be read.
    """
    directory, file = Path(model), Path(model) / "config.json"
    if directory.is_dir():  # new weights for a serving model may come without a config.json
        config = read_config(file) if file.exists() else {}
        return _read_directory(directory, config, headers=load_format not in OTHER_FILES)
    if not _is_hub_name(model) or load_format in OTHER_FILES:
        return Checkpoint({}, None, None)
    try:
        return _read_hub(model, revision, download_dir)
    except OSError:  # the engine has its own ways to fetch a model
        return Checkpoint({}, None, None)


def _is_hub_name(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith(("/", "."))


def _read_directory(directory: Path, config: Mapping[str, Any], headers: bool = True) -> Checkpoint:
    found = read_headers(directory) if headers and any(directory.glob("*.safetensors")) else None
    return Checkpoint(config, found, _quantization(config, directory / MODELOPT_FILE))


def _quantization(config: Mapping[str, Any], modelopt: Path) -> Mapping[str, Any] | None:
    if "quantization_config" in config:
        return config["quantization_config"]
    raw = read_config(modelopt) if modelopt.exists() else {}
    return raw if "quantization" in raw else None


def _read_hub(model: str, revision: str | None, download_dir: str | None) -> Checkpoint:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        file = Path(hf_hub_download(model, "config.json", revision=revision))
    except LocalEntryNotFoundError as e:
        raise OSError(
            f"{model}: config.json cannot be fetched, and is not in the hub's cache; is there a network?"
        ) from e
    except HfHubHTTPError as e:
        raise ValueError(f"{model}: {e}") from e
    config, commit = read_config(file), file.parent.name
    headers = _hub_headers(model, commit, download_dir)
    quantization = config.get("quantization_config")
    if quantization is None and any(is_quantized(leaves) for leaves in stored_modules(headers or {}).values()):
        with suppress(EntryNotFoundError, OSError):  # `check` reports what is missing
            quantization = _quantization({}, Path(hf_hub_download(model, MODELOPT_FILE, revision=commit)))
    return Checkpoint(config, headers, quantization)


def _hub_headers(model: str, commit: str, download_dir: str | None) -> Mapping[str, TensorInfo] | None:
    """Read the headers from the downloaded files of that commit, if there are any, otherwise from the hub."""
    from huggingface_hub import get_safetensors_metadata, try_to_load_from_cache
    from huggingface_hub.errors import NotASafetensorsRepoError, OfflineModeIsEnabled

    for name in (INDEX_FILE, SINGLE_FILE):
        for cache in {download_dir, None}:
            found = try_to_load_from_cache(model, name, cache_dir=cache, revision=commit)
            if isinstance(found, str) and is_complete(Path(found).parent):
                return read_headers(Path(found).parent)
    try:
        files = get_safetensors_metadata(model, revision=commit).files_metadata
    except (NotASafetensorsRepoError, OfflineModeIsEnabled, OSError):
        return None
    return {
        name: TensorInfo(tuple(tensor.shape), tensor.dtype, Path(file))
        for file, metadata in files.items()
        for name, tensor in metadata.tensors.items()
    }
