"""``qnext plan`` computes whether a model fits, for how many sequences of which length, and the command lines."""

import argparse
import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qnext_plugin.engines.config import mtp_flags

GIB = 2**30
BAR = 24
DTYPES = ("float32", "bfloat16", "float16")
_CACHE_DTYPES = {"fp8": "float8_e4m3fn", "bfloat16": "bfloat16"}


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    plan = commands.add_parser(
        "plan",
        help="memory, concurrency and command lines for a model, before it is loaded",
        description="From config.json, and the safetensors headers where there are any. Exit status 1: does not fit.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    plan.set_defaults(run=_run)
    plan.add_argument("model", metavar="MODEL", help="a local directory, or a name on the hub (no weights are fetched)")
    plan.add_argument("--revision", metavar="NAME", help="of a model on the hub")
    plan.add_argument("--gpu-memory", type=float, default=80, metavar="GIB", help="of each GPU")
    plan.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    plan.add_argument("--context-length", type=int, metavar="N", help="longest sequence (default: the checkpoint's)")
    plan.add_argument("--mtp", type=int, default=0, metavar="N", help="draft N tokens each step")
    plan.add_argument("--dtype", choices=DTYPES, help="of weights and activations (default: the checkpoint's)")
    plan.add_argument("--kv-cache-dtype", default="auto", choices=("auto", *_CACHE_DTYPES))
    plan.add_argument("--state-dtype", choices=DTYPES, help="of recurrent states (default: the engine's)")
    plan.add_argument("--no-prefix-caching", action="store_true")
    plan.add_argument("--block-size", type=int, metavar="N", help="vLLM's flag; Blackwell's attention wants 128")
    plan.add_argument("--max-num-seqs", type=int, metavar="N", help="most sequences that run at once")
    plan.add_argument(
        "--gpu-memory-utilization", type=float, default=0.92, metavar="SHARE", help="vLLM (default: 0.92)"
    )
    plan.add_argument("--reserve", type=float, default=3, metavar="GIB", help="vLLM's activations and graphs")
    plan.add_argument("--mem-fraction-static", type=float, default=0.8, metavar="SHARE", help="SGLang's flag")
    plan.add_argument("--cache-memory", type=float, metavar="GIB", help="for caches, instead of all estimates above")
    plan.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    plan.add_argument("--json", action="store_true", help="all numbers, for scripts")


def _run(args: argparse.Namespace) -> int:
    from qnext_plugin.checkpoint.stored import read_checkpoint  # imports torch

    plan = make_plan(args, read_checkpoint(args.model, args.revision))
    print(json.dumps(plan, indent=2) if args.json else _text(args, plan))
    return 0 if all(engine["fits"] for engine in plan["engines"].values()) else 1


def make_plan(args: argparse.Namespace, metadata: Any) -> dict[str, Any]:
    """Return all numbers of the plan; bytes are on one rank."""
    import torch

    from qnext_plugin.config import QNextConfig
    from qnext_plugin.plan.caches import default_cache_dtype
    from qnext_plugin.plan.sizes import Serving

    for name in ("gpu_memory", "cache_memory", "context_length", "block_size", "max_num_seqs"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected more than 0")
    if args.mtp < 0 or args.mtp >= 8:
        raise ValueError(f"--mtp is {args.mtp}, expected 0 to 7")
    config = metadata.complete(QNextConfig.from_dict(metadata.config))
    if metadata.headers is not None:
        metadata.check(config, "required" if args.mtp else "optional")
    named = args.dtype or metadata.config.get("dtype") or metadata.config.get("torch_dtype") or "bfloat16"
    serving = Serving(
        config,
        args.tensor_parallel_size,
        args.mtp,
        getattr(torch, named),
    )
    weights = serving.weights(metadata.headers)
    context = args.context_length or config.max_position_embeddings
    lengths = sorted({n for n in (4**i for i in range(5, 12)) if n < context} | {context})
    plan: dict[str, Any] = {
        "model": args.model,
        "layers": {"gated attention": serving.num_full_attention_layers, "Gated DeltaNet": serving.num_gdn_layers},
        "dtype": named,
        "weights_from": "safetensors headers" if metadata.headers else "config.json",
        "quantized": "quantization_config" in metadata.config,
        "weights": weights,
        "context_length": context,
        "trained_length": config.max_position_embeddings,
        "engines": {},
    }
    for engine, divide in (("vllm", _vllm), ("sglang", _sglang)):
        kept = _CACHE_DTYPES.get(args.kv_cache_dtype) or _name(
            default_cache_dtype(engine, args.device, metadata.quantization) or serving.dtype
        )
        serving = replace(serving, kv_cache_dtype=getattr(torch, kept))
        numbers, cache, memory = divide(args, serving, metadata.config, sum(weights.values()))
        numbers |= {"kv_cache_dtype": kept, "kv_bytes_per_token": serving.kv_bytes_per_token}
        found = {str(n): min(cache.concurrency(memory, n), numbers["max_num_seqs"]) for n in lengths}
        plan["engines"][engine] = numbers | {"cache_memory": memory, "concurrency": found}
        plan["engines"][engine]["fits"] = found[str(context)] >= 1
        plan["engines"][engine]["command"] = _COMMANDS[engine](args, plan)
    return plan


def _vllm(args: argparse.Namespace, serving: Any, config: Mapping[str, Any], weights: int) -> tuple[Any, Any, int]:
    import torch

    from qnext_plugin.plan.caches import DEVICES, VllmCache, default_state_dtype

    state_dtype = args.state_dtype or _name(default_state_dtype("vllm", args.device, config, serving.dtype))
    device = DEVICES[args.device]
    cache = VllmCache(serving, getattr(torch, state_dtype), device, not args.no_prefix_caching, args.block_size)
    memory = _cache_memory(args, args.gpu_memory_utilization, weights, args.reserve)
    # These are vLLM's defaults. On CPU it captures no graphs, so it refuses nothing.
    asked = args.max_num_seqs or (1024 if args.gpu_memory >= 70 else 256)
    numbers = {
        "state_dtype": state_dtype,
        "state_bytes_per_sequence": cache.state_blocks * cache.block_bytes,
        "block_size": cache.block_size,
        "num_blocks": cache.num_blocks(memory),
        "state_blocks_per_sequence": cache.state_blocks,
        "longest_sequence": cache.longest(memory),
        "max_num_seqs": asked,
        "max_num_seqs_refused": args.device == "cuda" and asked > cache.num_blocks(memory),
    }
    return numbers, cache, memory


def _sglang(args: argparse.Namespace, serving: Any, config: Mapping[str, Any], weights: int) -> tuple[Any, Any, int]:
    import torch

    from qnext_plugin.plan.caches import SglangCache, default_state_dtype

    state_dtype = args.state_dtype or _name(default_state_dtype("sglang", args.device, config, serving.dtype))
    prefix_caching = not args.no_prefix_caching
    cache = SglangCache(serving, getattr(torch, state_dtype), prefix_caching, max_running_requests=args.max_num_seqs)
    memory = _cache_memory(args, args.mem_fraction_static, weights, 0)
    numbers = {
        "state_dtype": state_dtype,
        "state_bytes_per_sequence": cache.state_bytes * (cache.slots_per_request + cache.verified_tokens),
        "num_slots": cache.num_slots(memory),
        "slots_per_sequence": cache.slots_per_request,
        "num_tokens": cache.num_tokens(memory),
        "running_requests": cache.running_requests(memory),
        "max_num_seqs": args.max_num_seqs or cache.running_requests(memory),
    }
    return numbers, cache, memory


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _cache_memory(args: argparse.Namespace, share: float, weights: int, reserve: float) -> int:
    if args.cache_memory is not None:
        return int(args.cache_memory * GIB)
    return max(0, int((args.gpu_memory * share - reserve) * GIB) - weights)


def _vllm_command(args: argparse.Namespace, plan: Mapping[str, Any]) -> str:
    numbers = plan["engines"]["vllm"]
    words = ["vllm", "serve", args.model, *_tensor_parallel(args, "--tensor-parallel-size")]
    words += ["--max-model-len", str(plan["context_length"])]
    words += ["--gpu-memory-utilization", f"{args.gpu_memory_utilization:g}"] if args.device == "cuda" else []
    if args.max_num_seqs or numbers["max_num_seqs_refused"]:
        words += ["--max-num-seqs", str(min(numbers["max_num_seqs"], numbers["num_blocks"]))]
    words += _given(args, {"dtype": "--dtype", "state_dtype": "--mamba-ssm-cache-dtype", "block_size": "--block-size"})
    words += ["--kv-cache-dtype", args.kv_cache_dtype] if args.kv_cache_dtype != "auto" else []
    words += ["--no-enable-prefix-caching"] if args.no_prefix_caching else []
    words += mtp_flags("vllm", args.mtp)
    longer = plan["context_length"] > plan["trained_length"]
    return "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 " * longer + shlex.join(words)


def _sglang_command(args: argparse.Namespace, plan: Mapping[str, Any]) -> str:
    words = ["python", "-m", "sglang.launch_server", "--model-path", args.model, *_tensor_parallel(args, "--tp-size")]
    words += ["--context-length", str(plan["context_length"])]
    words += ["--mem-fraction-static", f"{args.mem_fraction_static:g}"] if args.device == "cuda" else []
    names = {"max_num_seqs": "--max-running-requests", "dtype": "--dtype", "state_dtype": "--mamba-ssm-dtype"}
    words += _given(args, names)
    cache_dtype = "fp8_e4m3" if args.kv_cache_dtype == "fp8" else args.kv_cache_dtype
    words += ["--kv-cache-dtype", cache_dtype] if cache_dtype != "auto" else []
    words += ["--disable-radix-cache"] if args.no_prefix_caching else []
    words += mtp_flags("sglang", args.mtp)
    longer = plan["context_length"] > plan["trained_length"]
    return "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1 " * longer + shlex.join(words)


_COMMANDS = {"vllm": _vllm_command, "sglang": _sglang_command}


def _tensor_parallel(args: argparse.Namespace, flag: str) -> list[str]:
    return [flag, str(args.tensor_parallel_size)] if args.tensor_parallel_size > 1 else []


def _given(args: argparse.Namespace, flags: Mapping[str, str]) -> list[str]:
    return [word for name, flag in flags.items() if getattr(args, name) for word in (flag, str(getattr(args, name)))]


def _text(args: argparse.Namespace, plan: Mapping[str, Any]) -> str:
    layers = " and ".join(f"{count} {kind}" for kind, count in plan["layers"].items())
    total = sum(plan["weights"].values())
    lines = [
        f"{plan['model']}: {layers} layers{' with the draft' * bool(args.mtp)}, {plan['dtype']}",
        "",
        f"Each of {args.tensor_parallel_size} GPUs" if args.device == "cuda" else "Each rank",
        f"  weights              {total / GIB:9.2f} GiB   (from {plan['weights_from']})",
        *(f"    {kind:<18} {size / GIB:9.2f} GiB" for kind, size in plan["weights"].items()),
    ]
    if plan["quantized"] and plan["weights_from"] == "config.json":
        lines.append("  this checkpoint is quantized: without its headers the weights above are too large")
    for name, describe in (("vLLM", _vllm_text), ("SGLang", _sglang_text)):
        engine = plan["engines"][name.lower()]
        lines += ["", f"{name}, {engine['cache_memory'] / GIB:.1f} GiB for caches"]
        lines += describe(args, plan, engine) if engine["cache_memory"] else ["  the weights do not fit"]
    lines += ["", "Sequences at once", f"  {'tokens each':>11}   {'vLLM':<{BAR + 9}}   SGLang"]
    found = [plan["engines"][name]["concurrency"] for name in ("vllm", "sglang")]
    largest = max(1, *(max(concurrency.values()) for concurrency in found))
    for length in found[0]:
        bars = (_bar(concurrency[length], largest) for concurrency in found)
        lines.append(f"  {int(length):>11,}   {'   '.join(bars)}".rstrip())
    return "\n".join(lines)


def _keys_and_values(engine: Mapping[str, Any]) -> str:
    return f"  keys and values      {engine['kv_bytes_per_token']:9,} bytes per token, {engine['kv_cache_dtype']}"


def _vllm_text(args: argparse.Namespace, plan: Mapping[str, Any], vllm: Mapping[str, Any]) -> list[str]:
    block = f"{vllm['block_size']:,} tokens"
    lines = [
        _keys_and_values(vllm),
        f"  states               {vllm['state_bytes_per_sequence'] / 2**20:9.1f} MiB per sequence, "
        f"{vllm['state_dtype']}",
        f"  attention block      {block:>9}: prefixes are found again in whole blocks, so shorter prompts never hit",
        f"  blocks               {vllm['num_blocks']:9,}: a sequence takes {vllm['state_blocks_per_sequence']} for its "
        f"states, and 1 for each {block}",
    ]
    if vllm["max_num_seqs_refused"]:
        default = "" if args.max_num_seqs else ", its default,"
        lines.append(f"  --max-num-seqs {vllm['max_num_seqs']}{default} is refused: at most {vllm['num_blocks']}")
    if not vllm["fits"]:
        lines.append(f"  --max-model-len {plan['context_length']} is refused: at most {vllm['longest_sequence']}")
    return [*lines, f"  {vllm['command']}"]


def _sglang_text(args: argparse.Namespace, plan: Mapping[str, Any], sglang: Mapping[str, Any]) -> list[str]:
    lines = [
        _keys_and_values(sglang),
        f"  states               {sglang['state_bytes_per_sequence'] / 2**20:9.1f} MiB per sequence, "
        f"{sglang['state_dtype']}",
        f"  state slots          {sglang['num_slots']:9,}: a sequence takes {sglang['slots_per_sequence']}, "
        f"so {sglang['running_requests']:,} run at once",
        f"  tokens               {sglang['num_tokens']:9,}: of all sequences together",
    ]
    if not sglang["fits"]:
        lines.append(f"  a sequence of {plan['context_length']:,} tokens does not fit")
    if args.device == "cpu":
        lines.append("  without an accelerator qnext-plugin chooses smaller pools, unless told otherwise")
    return [*lines, f"  {sglang['command']}"]


def _bar(value: float, largest: float) -> str:
    number = f"{int(value):,}" if value >= 1 else "none fits"
    return f"{'█' * max(1, round(BAR * value / largest)) if value >= 1 else '':<{BAR}} {number:<8}"
