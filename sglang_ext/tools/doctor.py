"""Reports what SGLang would serve here; ``qnext doctor`` calls ``report`` in a separate process.

It puts every question to SGLang itself, which has loaded its plugins as it does to serve.
"""

from types import SimpleNamespace
from typing import Any

from qnext_plugin.engines.probe import make_report

ARCHITECTURES = {"target": "Qwen3NextForCausalLM", "draft": "Qwen3NextForCausalLMMTP"}


def examine(model: str, flags: list[str]) -> dict[str, Any]:
    """Return ``kernels`` by what they serve, ``errors`` that would stop the start, and ``risks`` with a way out."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import prepare_server_args

    server_args = prepare_server_args(["--model-path", model, *flags])
    server_args.resolve_once()
    args = resolving_view(server_args)
    model_config = ModelConfig.from_server_args(server_args)
    hf_config = model_config.hf_config
    errors = []
    try:
        check(hf_config, model_config.dtype, args)
    except ValueError as e:
        errors.append(str(e))
    return {
        "kernels": kernels(server_args, args, model_config),
        "errors": errors,
        "risks": risks(hf_config, args),
    }


def serving_classes() -> dict[str, str]:
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.plugins import load_plugins

    load_plugins()
    found = {}
    for role, architecture in ARCHITECTURES.items():
        cls, _ = ModelRegistry.resolve_model_cls([architecture])
        found[role] = f"{cls.__module__}.{cls.__name__}"
    return found


def check(hf_config: Any, dtype: Any, args: Any) -> None:
    """Check a configuration as the model does before it reads a weight."""
    from sglang.srt.runtime_context import attn_tp_size_of

    from qnext_plugin.checkpoint.stored import read_served
    from sglang_ext import compat
    from sglang_ext.config import check_dtype, check_exchange, check_grammars, check_packages, drafting, qnext_config

    compat.check_platform()
    check_dtype(dtype)
    check_exchange(args.moe_a2a_backend)
    config = qnext_config(hf_config, attn_tp_size_of(args))
    checkpoint = read_served(args.model_path, args.revision, args.load_format, args.download_dir)
    drafts = drafting(args, args, checkpoint, config, args.pp_size)
    check_grammars(args.grammar_backend, drafts)
    if drafts == "NEXTN":
        check_exchange(args.speculative_moe_a2a_backend)
    keeps_middle_states = not args.disable_radix_cache and args.mamba_radix_cache_strategy.startswith("extra_buffer")
    asked = check_packages(args.linear_attn_prefill_backend, keeps_middle_states)
    compat.apply(compat.Uses(model=True, drafts=drafts, adapters=args.enable_lora, packages=asked))
    if checkpoint.headers is not None:
        checkpoint.check(checkpoint.complete(config), mtp="required" if drafts == "NEXTN" else "optional")


def kernels(server_args: Any, args: Any, model_config: Any) -> dict[str, tuple[str, str]]:
    """Return what serves each phase of a Gated DeltaNet layer, experts and attention, and why."""
    from sglang_ext.compat import ON_CPU

    if ON_CPU:
        found = kernels_on_cpu(model_config.dtype)
    else:
        found = kernels_on_gpu(server_args, model_config)
        found["experts"] = (str(args.moe_runner_backend), "")
    if not args.speculative_algorithm:
        found.pop("verify", None)
    return found | {"attention": (args.attention_backend, "")}


def kernels_on_gpu(server_args: Any, model_config: Any) -> dict[str, tuple[str, str]]:
    """Return what serves each phase of a Gated DeltaNet layer on this GPU, by SGLang's own functions."""
    from sglang.srt.layers.attention.linear.gdn_backend import flashinfer_gdn_prefill_default
    from sglang.srt.layers.attention.linear.utils import resolve_linear_attn_backends
    from sglang.srt.runtime_context import publish

    publish(server_args, role="scheduler")
    # The default for prompts depends on the states' type, which SGLang reads from their pool.
    states = SimpleNamespace(temporal=SimpleNamespace(dtype=model_config.hf_config.mamba2_cache_params.dtype.temporal))
    pool = SimpleNamespace(mamba_pool=SimpleNamespace(mamba_cache=states))
    runner: Any = SimpleNamespace(model_config=model_config, req_to_token_pool=pool)
    found = resolve_linear_attn_backends(flashinfer_gdn_prefill_default(runner))
    return {phase: (getattr(found, phase).value, "") for phase in ("prefill", "decode", "verify")}


def kernels_on_cpu(dtype: Any) -> dict[str, tuple[str, str]]:
    """Return what serves each phase of a layer (convolution, delta rule) and experts on a CPU, and why not faster."""
    import torch

    from qnext_plugin.ops.cpu import delta_rule, gemm_avx512bf16
    from sglang_ext.cpu.gemm import FOR_AVX2, PACKS

    found = {
        phase: ("torch, torch", "SGLang's package from PyPI has no CPU kernels")
        for phase in ("prefill", "decode", "verify")
    }
    if delta_rule.available():
        found["decode"] = ("torch, numba", "")
    packed = PACKS and dtype == torch.bfloat16
    reason = (
        "" if packed else f"weights are packed in bfloat16 only, on a CPU with instructions for it; this is {dtype}"
    )
    compiled = "numba" if FOR_AVX2 or gemm_avx512bf16.available() else "onednn"
    return found | {"experts": (compiled if packed else "torch", reason)}


def risks(hf_config: Any, args: Any) -> list[tuple[str, str]]:
    """Return pairs of what may surprise in this configuration and which flag avoids it."""
    import torch

    from qnext_plugin.checkpoint.stored import read_served
    from sglang_ext.quantization import cache_note

    checkpoint = read_served(args.model_path, args.revision, args.load_format, args.download_dir)
    found = [note] if (note := cache_note(checkpoint, args.kv_cache_dtype)) else []
    if getattr(hf_config, "dtype", None) == torch.float32 and args.dtype == "auto":
        found.append(("SGLang serves a float32 checkpoint in float16", "--dtype float32"))
    if args.mamba_ssm_dtype in ("bfloat16", "float16"):
        found.append(
            (f"recurrent states are rounded to {args.mamba_ssm_dtype} after each step", "--mamba-ssm-dtype float32")
        )
    if not args.disable_radix_cache and args.mamba_radix_cache_strategy == "no_buffer":
        found.append(
            (
                "the prefix cache keeps states at the ends of requests only, without overlapped scheduling",
                "--mamba-radix-cache-strategy extra_buffer",
            )
        )
    return found


def report(model: str, flags: list[str]) -> dict[str, Any]:
    """Return what ``qnext doctor`` shows; never raise."""
    hooks, switches = ("sglang.srt.plugins",), ("SGLANG_PLUGINS",)
    return make_report("sglang_ext", "sglang", hooks, switches, serving_classes, examine, model, flags)
