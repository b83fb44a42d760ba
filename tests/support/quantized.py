"""What the tests of quantized checkpoints serve, on either engine."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qnext_plugin.checkpoint.make_quantized import IGNORE, quantize_checkpoint
from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.checkpoint.quantizers import FORMATS
from qnext_plugin.verify.scenarios import Scenario, tokens
from tests.support.cache_scales import FORM_OF_SCALES, add_cache_scales
from tests.support.dequantized import write_dequantized

# Every expert is used: between two that tie, rounding decides in any implementation.
SIZES = {
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,  # vLLM wants both in each pipeline stage
    "hidden_size": 256,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_attention_heads": 2,
    "head_dim": 128,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "max_position_embeddings": 1024,
}
SCENARIO = Scenario((tuple(tokens(length, seed=length) for length in (1, 7, 40, 130)),), drafts="cycle")


FORMS = (*FORMATS, "auto-round-mixed", "two-groups")
BY_TWO = ("fp8-channel", "w4a16")


def by_two(*values: str) -> Any:
    """Return parameters of a test of two processes, of which the last is the form; the default tests have BY_TWO."""
    return pytest.param(*values, marks=() if values[-1] in BY_TWO else pytest.mark.exhaustive)


def write(root: Path) -> None:
    """A checkpoint in each of ``FORMS``, by its name below ``root``, with scales for an FP8 cache that is not used."""
    write_random_checkpoint(root / "source", overrides=SIZES)
    for name in FORMS:
        write_form(root, name)
        if name in FORMATS:
            add_cache_scales(root / name, FORM_OF_SCALES[name], asks=False)


def write_form(root: Path, name: str) -> None:
    """Write what is in ``root / "source"`` in one of ``FORMS``, by its name below ``root``."""
    if name == "auto-round-mixed":
        _write_auto_round_mixed(root)
    elif name == "two-groups":
        _write_two_groups(root)
    else:
        quantize_checkpoint(root / "source", root / name, format=name)


def _write_auto_round_mixed(root: Path) -> None:
    """As AutoRound mixes bits: experts have 4, other linear layers 8, and some none. Groups are in order."""
    tensors, configs = _in_two_formats(root, "gptq", "gptq-int8", IGNORE)
    eight = {name.rpartition(".")[0] for name in tensors if name.endswith(".qzeros") and ".experts." not in name}
    plain = [name.removesuffix(".weight") for name in tensors if name.endswith("gate.weight")]
    settings = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "data_type": "int", "sym": True}
    settings |= {"bits": 4, "group_size": configs[0]["group_size"], "block_name_to_quantize": "model.layers"}
    settings["extra_config"] = {name: {"bits": 8} for name in eight} | {name: {"bits": 16} for name in plain}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".g_idx")}
    _save(root, "auto-round-mixed", tensors, settings)


def _write_two_groups(root: Path) -> None:
    """As llm-compressor mixes formats: FP4 experts, FP8 attention and a bfloat16 shared expert, stored fused."""
    tensors, configs = _in_two_formats(root, "nvfp4-llm-compressor", "fp8-channel", rf"{IGNORE}|.*\.shared_expert\..*")
    experts, others = ({**c["config_groups"]["group_0"], "format": c["format"]} for c in configs)
    experts["targets"], others["targets"] = [r"re:.*\.experts\..*"], ["re:.*self_attn.*", "re:.*linear_attn.*"]
    for name in [name for name in tensors if name.endswith("shared_expert.gate_proj.weight")]:
        parts = tensors.pop(name), tensors.pop(name.replace("gate_proj", "up_proj"))
        tensors[name.replace("gate_proj", "gate_up_proj")] = torch.cat(parts)
    groups = {"format": "mixed-precision", "config_groups": {"group_0": experts, "group_1": others}}
    _save(root, "two-groups", tensors, configs[0] | groups)


def _in_two_formats(root: Path, experts: str, others: str, ignore: str) -> tuple[dict[str, Tensor], list[dict]]:
    """The tensors of a checkpoint with its experts in another format than the rest, and both configurations."""
    expert, tensors, configs = r".*\.experts\.\d+\.\w+", {}, []
    for form, ignored in ((experts, rf"(?!{expert}$).*"), (others, rf"{ignore}|{expert}")):
        directory = root / "parts" / f"{experts}-{others}-{form}"
        quantize_checkpoint(root / "source", directory, format=form, ignore=ignored)
        configs.append(json.loads((directory / "config.json").read_text())["quantization_config"])
        stored = load_file(directory / "model.safetensors")
        tensors |= {name: tensor for name, tensor in stored.items() if (".experts." in name) == (form == experts)}
    return tensors, configs


def _save(root: Path, name: str, tensors: dict[str, Tensor], quantization: dict) -> None:
    shutil.copytree(root / "source", root / name, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((root / name / "config.json").read_text())
    (root / name / "config.json").write_text(json.dumps(raw | {"quantization_config": quantization}))


def dequantized(root: Path, form: str) -> Path:
    """The same values in float32, for `transformers`."""
    directory = root / f"{form}-dequantized"
    return directory if directory.exists() else write_dequantized(root / form, directory)
