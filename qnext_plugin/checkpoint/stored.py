"""Read the metadata of a checkpoint in a local directory or on the Hugging Face hub."""

import math
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

from torch import Tensor

from qnext_plugin.checkpoint import hub
from qnext_plugin.checkpoint.cache_scales import cache_scales, check_cache_scales
from qnext_plugin.checkpoint.coverage import check_coverage
from qnext_plugin.checkpoint.formats import Leaves, dequantize
from qnext_plugin.checkpoint.headers import (
    INDEX_FILE,
    Both,
    Shape,
    TensorInfo,
    check_distinct,
    index_advice,
    read_directory,
)
from qnext_plugin.checkpoint.kinds import check_kind
from qnext_plugin.checkpoint.layer_codes import Codes, common, stored_codes
from qnext_plugin.checkpoint.layouts import FP8_BLOCK, KINDS, can_ungroup
from qnext_plugin.checkpoint.merged import MERGED, modules_of, parameter_of
from qnext_plugin.checkpoint.quantization import (
    SCALES,
    WEIGHTS,
    check_quantization,
    is_quantized,
    of_one_row,
    stored_modules,
)
from qnext_plugin.checkpoint.schema import weight_shapes
from qnext_plugin.config import QNextConfig, read_config

MODELOPT_FILE = "hf_quant_config.json"  # ModelOpt's file for the settings that others write to config.json
OTHER_FILES = frozenset(
    (
        *("pt", "npcache", "tensorizer", "sharded_state", "runai_streamer_sharded", "mistral"),
        *("gguf", "bitsandbytes", "expert_pack", "jax", "remote"),
    )
)
"""These load formats of the engines read other files than the safetensors files of a published checkpoint."""

_ROW_PARALLEL = ("o_proj", "out_proj", "down_proj")


@dataclass(frozen=True)
class Checkpoint:
    """The metadata of a checkpoint, known before a weight is read.

    ``config`` is the content of ``config.json``. ``headers`` are None if there are no safetensors files or their
    headers cannot be read. ``quantization`` is the checkpoint's description of its quantization. ``unread`` are the
    headers of safetensors files that the engines leave unread, because an index does not name them.
    """

    config: Mapping[str, Any]
    headers: Mapping[str, TensorInfo] | None
    quantization: Mapping[str, Any] | None
    unread: Mapping[str, TensorInfo] = field(default_factory=dict)

    @cached_property
    def quantized(self) -> Mapping[str, Leaves] | None:
        """The stored tensors of all modules; None if the checkpoint is not quantized or has no headers."""
        return None if self.quantization is None or self.headers is None else stored_modules(self.headers)

    @cached_property
    def cache_scales(self) -> Mapping[str, Mapping[str, str]]:
        """The stored scales for an FP8 cache, by the attention layer's name in both engines."""
        return cache_scales(self.headers or {})

    @property
    def may_draft(self) -> bool:
        """Whether there are ``mtp.*`` tensors, also in files that the index does not name, or no headers that tell."""
        return self.headers is None or any(name.startswith("mtp.") for name in (*self.headers, *self.unread))

    def check(self, config: QNextConfig, mtp: Literal["required", "optional"] = "optional") -> None:
        """Raise ``ValueError`` if the headers do not fit the configuration or each other."""
        assert self.headers is not None
        try:
            check_coverage(config, self.headers, mtp=mtp)
        except ValueError as e:
            raise (self._incomplete_index(config, mtp) or e) from None
        check_quantization(self.headers, self.quantization, weight_shapes(config) if self.quantization else {})
        check_cache_scales(self.headers, self.quantization)

    def _incomplete_index(self, config: QNextConfig, mtp: Literal["required", "optional"]) -> ValueError | None:
        """Return an error if the checkpoint is complete with the files that the index does not name."""
        if not self.unread:
            return None
        try:
            check_coverage(config, {**self.unread, **(self.headers or {})}, mtp=mtp)
        except ValueError:
            return None
        files = sorted({info.file for info in self.unread.values()})
        names = ", ".join(file.name for file in files)
        return ValueError(
            f"the rest of this checkpoint is in {names}, which {INDEX_FILE} does not name, and the engines load only "
            f"what it names; {index_advice(files[0].parent)}"
        )

    def complete(self, config: QNextConfig) -> QNextConfig:
        """Return ``config`` with the draft's own number of experts, which only the headers tell."""
        router = (self.headers or {}).get("mtp.layers.0.mlp.gate.weight")
        return replace(config, mtp_num_experts=router.shape[0]) if router is not None and router.shape else config

    def parts(self, layer: str, num_experts: int) -> dict[str, Leaves]:
        """Return the stored modules of a layer; the result is empty if none of them is quantized.

        The name of a draft's layer contains ``mtp``.
        """
        stored = self.quantized or {}
        parts = {name: stored[name] for name in modules_of(layer, num_experts) if name in stored}
        return parts if any(is_quantized(leaves) for leaves in parts.values()) else {}

    def obstacle(self, parts: Mapping[str, Leaves], config: QNextConfig, tp_size: int) -> str | None:
        """Return why a layer's ``parts`` cannot be served as stored, as far as this is known without the engine."""
        dtypes = {tuple((leaf, info.dtype) for leaf, info in sorted(leaves.items())) for leaves in parts.values()}
        rows = {of_one_row(leaves) for name, leaves in parts.items() if ".experts." not in name}
        # The weights of an expert's projections have as many elements, so packed words differ with their bits.
        experts = [leaves for name, leaves in parts.items() if ".experts." in name]
        sizes = {math.prod(info.shape) for leaves in experts for leaf, info in leaves.items() if leaf in WEIGHTS}
        if len(dtypes) > 1 or len(rows) > 1 or len(sizes) > 1:
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

    def codes(self, parts: Mapping[str, Leaves], shapes: Mapping[str, Shape], ranks: int) -> dict[str, Codes]:
        """Return the codes that hold a layer's ``parts``, by ``parameter_of`` them.

        ``shapes`` are those of the weights by name; ``ranks`` share the inputs of row-parallel layers. Raises
        ``ValueError`` with the reason if the compiled products cannot take the layer.
        """
        found: dict[str, list[Codes]] = {}
        for name, leaves in parts.items():
            last = name.rpartition(".")[2]
            if last == "embed_tokens" or (last == "lm_head" and self.config.get("tie_word_embeddings")):
                raise ValueError("rows of an embedding are looked up")
            if not is_quantized(leaves):
                raise ValueError("its parts are stored in different ways")
            inputs_among = ranks if last in _ROW_PARALLEL else 1
            part = stored_codes(leaves, shapes[f"{name}.weight"], self.quantization or {}, inputs_among)
            found.setdefault(parameter_of(name), []).append(part)
        return {parameter: common(parts) for parameter, parts in found.items()}

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
    check_kind(model, {})
    if hub.uses_modelscope():
        directory = hub.modelscope_directory(model, revision)
        if directory is None:
            raise ValueError(f"{model}: not in ModelScope's cache; download it from there, and give its directory")
        return _read_directory(directory, read_config(directory / "config.json"))
    check_name(model)
    return _read_hub(model, revision, None)


def check_name(model: str) -> None:
    """Raise ``ValueError`` if ``model``, which is no local directory, cannot be a name on the hub either."""
    if not _is_hub_name(model):
        example = "Qwen/Qwen3-Next-80B-A3B-Instruct"
        raise ValueError(f"{model!r} is neither a local directory nor a name on the hub, such as {example}")


def read_served(model: str, revision: str | None, load_format: str, download_dir: str | None) -> Checkpoint:
    """Read the metadata of the checkpoint that an engine loads, of whatever kind it is.

    There are no headers if the engine loads no safetensors files. Raises ``ValueError`` for a local checkpoint that
    cannot be read.
    """
    directory = Path(model)
    if hub.uses_modelscope() and not directory.is_dir():
        directory = hub.modelscope_directory(model, revision) or directory
    if directory.is_dir():
        file = directory / "config.json"  # new weights for a serving model may come without one
        config = read_config(file) if file.exists() else {}
        return _all_read(load_format, _read_directory(directory, config, headers=load_format not in OTHER_FILES))
    check_kind(model, {})
    if not _is_hub_name(model) or load_format in OTHER_FILES or hub.uses_modelscope():
        return Checkpoint({}, None, None)
    try:
        return _all_read(load_format, _read_hub(model, revision, download_dir))
    except OSError:  # the engine has its own ways to fetch a model
        return Checkpoint({}, None, None)


def _all_read(load_format: str, found: Checkpoint) -> Checkpoint:
    """Return ``found``; raise ``ValueError`` if an engine would read a file beside the index that has the same tensors.

    On vLLM ``runai_streamer`` reads all files, whatever the index says.
    """
    if load_format == "runai_streamer":
        check_distinct("--load-format runai_streamer", found.headers or {}, found.unread)
    return found


def refuse_quantizing(method: str, possible: str = "none is possible") -> NoReturn:
    """Raise ``ValueError``: this CPU cannot quantize a plain checkpoint by ``method`` while loading it."""
    raise ValueError(
        f"--quantization {method} found, and the checkpoint is not quantized; of the methods that quantize weights "
        f"while loading, {possible} on this CPU: drop the flag, or serve a checkpoint that is stored quantized"
    )


def _is_hub_name(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith(("/", "."))


def _read_directory(directory: Path, config: Mapping[str, Any], headers: bool = True) -> Checkpoint:
    files = os.listdir(directory)
    found = read_directory(directory) if headers and any(name.endswith(".safetensors") for name in files) else None
    return _checkpoint(str(directory), config, files, found, _quantization(config, directory / MODELOPT_FILE))


def _checkpoint(
    where: str, config: Mapping[str, Any], files: Collection[str], found: Both | None, quantization: Any
) -> Checkpoint:
    headers, unread = (None, {}) if found is None else found
    check_kind(where, config, files, headers or ())
    return Checkpoint(config, headers, quantization, unread)


def _quantization(config: Mapping[str, Any], modelopt: Path) -> Mapping[str, Any] | None:
    if "quantization_config" in config:
        return config["quantization_config"]
    raw = read_config(modelopt) if modelopt.exists() else {}
    return raw if "quantization" in raw else None


def _read_hub(model: str, revision: str | None, download_dir: str | None) -> Checkpoint:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        file = Path(hf_hub_download(model, "config.json", revision=revision))
    except LocalEntryNotFoundError as e:
        raise OSError(
            f"{model}: config.json cannot be fetched, and is not in the hub's cache; is there a network?"
        ) from e
    except HfHubHTTPError as e:
        if isinstance(e, EntryNotFoundError):
            check_kind(model, {}, HfApi().list_repo_files(model, revision=revision))
        raise ValueError(f"{model}: {e}") from e
    config, snapshot = read_config(file), file.parent
    files, found = hub.headers_of_commit(model, snapshot, download_dir)
    quantization, modules = config.get("quantization_config"), stored_modules(found[0] if found else {})
    if quantization is None and any(is_quantized(leaves) for leaves in modules.values()):
        with suppress(EntryNotFoundError, OSError):  # `check` reports what is missing
            quantization = _quantization({}, Path(hf_hub_download(model, MODELOPT_FILE, revision=snapshot.name)))
    return _checkpoint(model, config, files, found, quantization)
