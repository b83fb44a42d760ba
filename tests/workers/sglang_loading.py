"""Checkpoints loaded as every rank of larger groups would load them, in one process, and nothing runs.

That is SGLang's own way from ``config.json`` to the model: on this CPU, where every layer is dequantized, and then as
SGLang would on a GPU of compute capability 9, where layers are served as stored.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qnext_plugin.checkpoint.quantizers import FORMATS
from qnext_plugin.config import QNextConfig
from qnext_plugin.ops.cpu import stored as stored_codes
from tests.support.cache_scales import FORM_OF_SCALES, SETTINGS, scale
from tests.support.dequantized import dequantized
from tests.support.reads import Reads
from tests.support.shards import OUTER_RANKS, RANKS, attention_and_experts, checkpoints, expected, weights_of

# Eight experts, four of them twice, in no order.
PHYSICAL = [5, 0, 7, 2, 4, 6, 1, 3, 5, 6, 2, 0]
WAYS: dict[str, dict[str, Any]] = {
    "TP 2": {},
    "EP 2": {"ep_size": 2},
    "EP 2, balanced": {
        "ep_size": 2,
        "ep_num_redundant_experts": 4,
        "init_expert_location": json.dumps({"physical_to_logical_map": [PHYSICAL, PHYSICAL[::-1]]}),
    },
}
READ = ("plain", "fp8-channel")
ALONE = SimpleNamespace(world_size=1, rank_in_group=0, is_first_rank=True, is_last_rank=True)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """SGLang's classes for GPUs, which store weights in the same way on any device."""
    from sglang.srt.layers.quantization import marlin_utils
    from sglang.srt.layers.quantization.awq import awq
    from sglang.srt.model_loader import loader
    from sglang.srt.platforms import current_platform

    from sglang_ext import quantization

    with ExitStack() as patches:
        patches.enter_context(patch.object(quantization, "ON_CPU", False))
        patches.enter_context(patch.object(type(current_platform), "get_quantization_config", lambda *_: None))
        patches.enter_context(patch.object(awq, "_is_cuda", True))
        for module in (loader, marlin_utils, torch.cuda):
            patches.enter_context(patch.object(module, "get_device_capability", lambda: (9, 0)))
        yield


def load(
    directory: Path,
    tensors: dict[str, Tensor],
    quantization: dict[str, Any],
    moe_runner: str = "auto",
    ranks: Sequence[tuple[int, int]] = (),
) -> dict[str, list[str]]:
    """Check every rank's parameters, target and draft; by rank, the layers that are served as stored."""
    config, as_stored = QNextConfig.from_pretrained(directory), {}
    stored = list(load_file(directory / "model.safetensors").items())
    for tp, rank in ranks or (OUTER_RANKS if directory.name.endswith("-mixed") else RANKS):
        names = {}
        for draft in (False, True):
            with rank_of(directory, tp, rank, moe_runner_backend=moe_runner):
                model = make_model(directory, draft)
                model.load_weights(iter(stored))
                if quantization:
                    check_cache_scales(model, directory)
            if draft:
                parts = attention_and_experts(tensors, config, rank, tp, "mtp.layers.0.self_attn.", "mtp.layers.0.mlp.")
                parts |= {"mtp.fc.weight": tensors["mtp.fc.weight"]}
                shards = {name.replace("mtp.", "model."): shard for name, shard in parts.items()}
            else:
                shards = expected(tensors, config, rank, tp)
            for name, shard in shards.items():
                where = f"{directory.name}, {type(model).__name__}: {name}, rank {rank} of {tp}"
                actual, is_quantized = weights_of(model, name.replace(".routed_experts", ""), quantization)
                if is_quantized:
                    torch.testing.assert_close(actual, shard.float(), rtol=1e-6, atol=0, msg=where)
                    names[f"{type(model).__name__}.{name}"] = None
                else:
                    # NVFP4's product of two scales is rounded in another place.
                    rtol = 2**-7 if quantization.get("quant_method") == "modelopt" else 0
                    torch.testing.assert_close(actual, shard.to(actual.dtype), rtol=rtol, atol=0, msg=where)
        as_stored[f"{rank} of {tp}"] = list(names)
    return as_stored


def check_cache_scales(model: nn.Module, directory: Path) -> None:
    """Each attention layer uses the checkpoint's scales; without a flag the cache is what it asks for, on a GPU."""
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.mem_cache.kv_cache_dtype import configure_kv_cache_dtype

    from sglang_ext import quantization

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, RadixAttention)}
    assert layers
    for name, layer in layers.items():
        layer.quant_method.process_weights_after_loading(layer)
        outer = name.removesuffix(".attn").replace("model.", "mtp." if "MTP" in type(model).__name__ else "model.", 1)
        for x in "kv":
            used = (getattr(layer, f"{x}_scale").item(), getattr(layer, f"{x}_scale_float"))
            assert used == (scale(outer, x),) * 2, f"{directory.name}: {outer}, {x}: {used}"
        model.load_weights([(f"{outer}.k_proj.k_scale", torch.tensor(3.0))])
        assert layer.k_scale_float == 3, "an update from tensors does not reach the kernels"
    _, cache = configure_kv_cache_dtype(
        server_args_kv_cache_dtype="auto",
        model=model,
        model_dtype=torch.get_default_dtype(),
        is_draft_worker=False,
        is_dflash=False,
        speculative_draft_attention_backend="",
    )
    asks, on_cpu = FORM_OF_SCALES[directory.name.removesuffix("-mixed")] in SETTINGS, quantization.ON_CPU
    assert (cache == torch.float8_e4m3fn) == (asks and not on_cpu), f"{directory.name}: {cache}"
    assert (quantization.cache_note(model.checkpoint, "auto") is not None) == (asks and on_cpu)
    assert quantization.cache_note(model.checkpoint, "fp8_e4m3") is None


@contextmanager
def rank_of(directory: Path, tp: int, rank: int, **args: Any) -> Iterator[None]:
    """This process is one of ``tp`` ranks, as far as building and loading a model goes."""
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.runtime_context import SpawnRanks, get_parallel, publish
    from sglang.srt.server_args import ServerArgs

    from sglang_ext.cpu import gemm as cpu_gemm

    get_parallel().clear_stamp()
    server_args = ServerArgs(model_path=str(directory), dtype=dtype(), tp_size=tp, skip_tokenizer_init=True, **args)
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=rank))
    initialize_moe_config()
    group = SimpleNamespace(world_size=tp, rank_in_group=rank, cpu_group=None)
    groups = dict.fromkeys(("tp_group", "attn_tp_group"), group) | {"pp_group": ALONE}
    apart = "moe_ep_group" if args.get("ep_size", 1) > 1 else "moe_tp_group"
    groups |= dict.fromkeys(("moe_ep_group", "moe_tp_group"), ALONE) | {apart: group}
    with get_parallel().override(**groups), patch.object(cpu_gemm, "PACKS", False):
        yield


def make_model(directory: Path, draft: bool) -> nn.Module:
    """As SGLang makes it, which is told what it has to know of the checkpoint's quantization."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import _get_quantization_config, _initialize_model

    model_config = ModelConfig(str(directory), dtype=dtype(), is_draft_model=draft)
    model = _initialize_model(model_config, LoadConfig(), _get_quantization_config(model_config, LoadConfig()))
    assert type(model).__module__ == ("sglang_ext.mtp" if draft else "sglang_ext.model")
    return model


def dtype() -> str:
    return str(torch.get_default_dtype()).removeprefix("torch.")


def read(directory: Path, quantized: bool) -> dict[str, Any]:
    """By way to split, what the second of two ranks reads of each tensor, and allocates, in loading the model."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.eplb.expert_location import (
        compute_initial_expert_location_metadata,
        set_global_expert_location_metadata,
    )

    stored = list(load_file(directory / "model.safetensors").items())
    tensors = dequantized(directory) if quantized else dict(stored)
    found = {}
    for way, args in WAYS.items():
        with rank_of(directory, 2, 1, **args):
            location = compute_initial_expert_location_metadata(ModelConfig(str(directory), dtype=dtype()), 1)
            set_global_expert_location_metadata(location, allow_overwrite=True)
            model = make_model(directory, draft=False)
            with Reads(stored) as reads:
                model.load_weights(iter(reads.stored))
            set_global_expert_location_metadata(None, allow_overwrite=True)
        experts = model.model.layers[0].mlp.experts
        mine = location.physical_to_logical_map[0].chunk(args.get("ep_size", 1))[-1].tolist()
        for held, logical in zip(experts.w2_weight, mine, strict=True):
            down = tensors[f"model.layers.0.mlp.experts.{logical}.down_proj.weight"].to(held.dtype)
            torch.testing.assert_close(held, down if "ep_size" in args else down.chunk(2, 1)[1], rtol=0, atol=0)
        found[way] = reads.summary(mine)
    return found


def check(root: str) -> dict[str, Any]:
    """By checkpoint below ``root``, for every rank which layers are served as stored; ``read NAME`` for what is read.

    An assertion names the parameter whose shard is not the expected one.
    """
    found: dict[str, Any] = {}
    from sglang.srt.plugins import load_plugins

    load_plugins()
    for directory, tensors, quantization in checkpoints(Path(root)):
        torch.set_default_dtype(torch.bfloat16 if quantization else torch.float32)
        with patch.object(stored_codes, "serves", lambda: False):
            if directory.name in READ:
                found[f"read {directory.name}"] = read(directory, bool(quantization))
            found[directory.name] = load(directory, tensors, quantization)
        if directory.name in FORMATS:
            with patch.object(stored_codes, "serves", lambda: True):
                found[f"{directory.name}, codes"] = load(directory, tensors, quantization, ranks=[(1, 0), (8, 7)])
        if quantization:
            method = quantization["quant_method"]
            # These store scales in float16, which SGLang converts to the type it serves in.
            torch.set_default_dtype(torch.float16 if method in ("gptq", "awq") else torch.bfloat16)
            loaded: dict[str, Any]
            with as_on_a_gpu():
                try:
                    loaded = load(directory, tensors, quantization, "marlin" if method == "modelopt" else "auto")
                except (NotImplementedError, ValueError) as e:
                    loaded = {"refused": str(e)}
            found[f"{directory.name}, as on a GPU"] = loaded
    return found
