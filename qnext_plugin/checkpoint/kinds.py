"""Checkpoints of this architecture that no class of ours loads: what each is, and what to take instead."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any


def check_kind(model: str, config: Mapping[str, Any], files: Collection[str] = (), tensors: Iterable[str] = ()) -> None:
    """Raise ``ValueError`` for a GGUF, MLX or bitsandbytes checkpoint, and for one in ``.pth`` files.

    ``model`` is its directory or name, ``files`` are the names of its files, ``tensors`` those of its tensors; fewer
    are enough if not all are known.
    """
    suffixes = {name.rpartition(".")[2] for name in files}
    described = [q for key in ("quantization", "quantization_config") if isinstance(q := config.get(key), Mapping)]
    # A file, or one of a repository by the name of its format: owner/name:Q4_K_M.
    names_gguf = not files and (model.endswith(".gguf") or re.fullmatch(r"[^/:]+/[^/:]+:[\w.-]+", model))
    if names_gguf or ("gguf" in suffixes and not suffixes & {"safetensors", "bin"}):
        found = "a GGUF checkpoint, which is for llama.cpp"
    elif any("bits" in q and "quant_method" not in q for q in described) or any(".switch_mlp." in n for n in tensors):
        found = "an MLX checkpoint, which is for Apple's GPUs"
    elif "pth" in suffixes and not suffixes & {"safetensors", "bin", "pt"}:
        found = "a checkpoint in .pth files, which neither engine loads"
    elif any(q.get("quant_method") == "bitsandbytes" for q in described):
        found = "quantized with bitsandbytes, which neither engine loads for this architecture"
    else:
        return
    raise ValueError(
        f"{model}: {found}; take one of the same model in safetensors files, in bfloat16 or quantized to FP8, AWQ, "
        "GPTQ or NVFP4"
    )
