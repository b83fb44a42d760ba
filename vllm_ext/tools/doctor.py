"""Reports what vLLM would serve here; ``qnext doctor`` calls ``report`` in a separate process.

It puts every question to vLLM itself, which has loaded its plugins as it does to serve.
"""

from dataclasses import replace
from typing import Any

from qnext_plugin.engines.probe import make_report

ARCHITECTURES = {"target": "Qwen3NextForCausalLM", "draft": "Qwen3NextMTP"}


def examine(model: str, flags: list[str]) -> dict[str, Any]:
    """Return ``kernels`` by what they serve, ``errors`` that would stop the start, and ``risks`` with a way out."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_ext.config import cache_memory_note

    parsed = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--model", model, *flags])
    vllm_config = AsyncEngineArgs.from_cli_args(parsed).create_engine_config()
    errors = []
    try:
        check(vllm_config)
    except ValueError as e:
        errors.append(str(e))
    notes = [note] if (note := cache_memory_note(parsed.kv_cache_memory_bytes)) else []
    return {"kernels": kernels(vllm_config), "errors": errors, "risks": notes + risks(vllm_config)}


def serving_classes() -> dict[str, str]:
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    found = {}
    for role, architecture in ARCHITECTURES.items():
        cls = ModelRegistry.models[architecture].load_model_cls()
        found[role] = f"{cls.__module__}.{cls.__name__}"
    return found


def check(vllm_config: Any) -> None:
    """Check a configuration as the model does before it reads a weight."""
    from vllm_ext import compat
    from vllm_ext.config import check_runner, check_speculation, qnext_config, uses_mtp
    from vllm_ext.quantization import read_checkpoint
    from vllm_ext.weights import check_checkpoint

    check_runner(vllm_config)
    check_speculation(vllm_config)
    compat.apply(vllm_config)
    mtp = "required" if uses_mtp(vllm_config) else "optional"
    checkpoint = read_checkpoint(vllm_config)
    check_checkpoint(checkpoint, checkpoint.complete(qnext_config(vllm_config)), vllm_config, mtp=mtp)


def kernels(vllm_config: Any) -> dict[str, tuple[str, str]]:
    """Return what serves each Gated DeltaNet phase (convolution, delta rule), products and attention, and why."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    from vllm_ext.config import qnext_config
    from vllm_ext.kernels import select_kernels

    config, model_config = qnext_config(vllm_config), vllm_config.model_config
    with set_current_vllm_config(vllm_config):
        dims = config.gdn.shard(vllm_config.parallel_config.tensor_parallel_size)
        found = dict(select_kernels(dims, vllm_config).describe())
        if vllm_config.speculative_config is None:
            del found["verify"]
        found |= products(config, vllm_config)
        backend = get_attn_backend(config.head_dim, model_config.dtype, vllm_config.cache_config.cache_dtype)
        found["attention"] = (backend.get_name(), "")
    return found


def products(config: Any, vllm_config: Any) -> dict[str, tuple[str, str]]:
    """Return what serves the experts and a draft's own head, as chosen for a single rank, and why.

    On a CPU we build layers of a quantized checkpoint as the model does. On a GPU we do not: that may need its memory.
    """
    import torch
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform
    from vllm.utils.network_utils import get_open_port
    from vllm.utils.torch_utils import set_default_torch_dtype

    from qnext_plugin.checkpoint.quantized_layers import holds_codes
    from vllm_ext.config import uses_mtp
    from vllm_ext.kernels import choose_draft_head, choose_gemms
    from vllm_ext.quantization import is_plain, layer_quantization, read_checkpoint
    from vllm_ext.sparse_moe import SparseMoeBlock

    found: dict[str, tuple[str, str]] = {}
    quantization = layer_quantization(read_checkpoint(vllm_config), config, vllm_config)
    sparse = next((i for i in range(config.num_hidden_layers) if config.is_sparse(i)), None)
    init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "gloo")
    initialize_model_parallel()

    def held(layer: Any, vllms: str) -> tuple[str, str]:
        if holds_codes(layer):
            kinds = sorted({codes.kind for codes in layer.quant_method.codes.values()})
            return f"compiled, as stored ({', '.join(kinds)})", ""
        reason = getattr(layer, "dequantized", "")
        return ("dequantized while loading", reason) if reason or is_plain(layer) else (vllms, "")

    with torch.device("meta"), set_default_torch_dtype(vllm_config.model_config.dtype):
        if quantization is not None:
            vllms = f"vLLM's for {quantization.get_name()}"
            if not current_platform.is_cpu():
                found["experts"] = (vllms, "")
            elif sparse is not None:
                block = SparseMoeBlock(config, vllm_config, quantization, prefix=f"model.layers.{sparse}.mlp")
                found["experts"] = held(block.experts.routed_experts, vllms)
                found["shared expert"] = held(block.shared_expert.down_proj, vllms)
        elif sparse is not None:
            block = SparseMoeBlock(config, vllm_config, None, prefix="mlp")
            choose_gemms(block, config, vllm_config)
            method = block.experts.routed_experts.quant_method
            found["experts"] = (str(vars(method.experts_cls).get("name", method.unquantized_backend.value)), "")
        if uses_mtp(vllm_config):
            head = ParallelLMHead(config.vocab_size, config.hidden_size, quant_config=quantization, prefix="lm_head")
            if choose_draft_head(head, config, vllm_config):
                found["draft head"] = ("int8", "")
    return found


def risks(vllm_config: Any) -> list[tuple[str, str]]:
    """Return pairs of what may surprise in this configuration and which flag avoids it."""
    import os

    import torch
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import get_attn_backend

    from qnext_plugin.checkpoint.cache_scales import asks_for_fp8_cache
    from qnext_plugin.plan.caches import DEVICES, VllmCache
    from qnext_plugin.plan.sizes import Serving
    from vllm_ext.config import missing_fp8_cache, qnext_config, quantization_of
    from vllm_ext.kernels import select_kernels
    from vllm_ext.state import state_dtypes

    cache_config, model_config = vllm_config.cache_config, vllm_config.model_config
    config, (_, state_dtype), found = qnext_config(vllm_config), state_dtypes(vllm_config), []
    serving = Serving(
        config,
        vllm_config.parallel_config.tensor_parallel_size,
        vllm_config.num_speculative_tokens,
        model_config.dtype,
        torch.float8_e4m3fn if cache_config.cache_dtype.startswith("fp8") else None,
    )
    asked = cache_config.block_size if cache_config.user_specified_block_size else None
    caching = cache_config.enable_prefix_caching
    with set_current_vllm_config(vllm_config):
        kernels = select_kernels(config.gdn.shard(serving.tp_size), vllm_config)
    device = DEVICES["cpu" if current_platform.is_cpu() else "cuda"]
    device = replace(device, checkpoints=kernels.checkpoint_alignment)
    cache = VllmCache(serving, state_dtype, device, caching, asked)
    block_size = cache.block_size
    if caching and cache_config.prefix_match_unit is None:
        found.append(
            (
                f"prefixes are found again in whole blocks of {block_size} tokens, so shorter prompts never hit",
                f"--prefix-match-unit {cache.prefix_match_unit}",
            )
        )
    if asked not in (None, block_size, device.block_size):  # `KeepsBlockSize` sets the last
        found.append((f"--block-size {asked} becomes {block_size}, so that a block holds a state", "drop --block-size"))
    if asked is not None:
        with set_current_vllm_config(vllm_config):
            backends = []
            for cache_config.user_specified_block_size in (False, True):
                chosen = get_attn_backend(config.head_dim, model_config.dtype, cache_config.cache_dtype)
                backends.append(chosen.get_name())
        if len(set(backends)) > 1:
            found.append((f"--block-size {asked} changes attention from {backends[0]} to {backends[1]}", "drop it"))
    if state_dtype != torch.float32:
        found.append(
            (f"recurrent states are rounded to {state_dtype} after each step", "--mamba-ssm-cache-dtype float32")
        )
    if cache_config.cache_dtype == "auto" and asks_for_fp8_cache(quantization_of(vllm_config)):
        found.append(
            (
                f"keys and values are kept in {model_config.dtype}, not in FP8 as the checkpoint asks: "
                f"{missing_fp8_cache(vllm_config)}",
                "--kv-cache-dtype bfloat16",
            )
        )
    if vllm_config.speculative_config is not None and caching and not current_platform.is_cpu():
        found.append(
            (
                "vLLM has open reports of wrong states with MTP and prefix caching on GPUs; compare answers without",
                "--no-enable-prefix-caching",
            )
        )
    if current_platform.is_cpu() and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        found.append(("vLLM leaves one core idle", "VLLM_CPU_OMP_THREADS_BIND=nobind in the environment"))
    return found


def report(model: str, flags: list[str]) -> dict[str, Any]:
    """Return what ``qnext doctor`` shows; never raise."""
    hooks, switches = ("vllm.general_plugins",), ("VLLM_PLUGINS",)
    return make_report("vllm_ext", "vllm", hooks, switches, serving_classes, examine, model, flags)
