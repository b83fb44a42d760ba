"""``qnext plan`` computes whether a model fits, for how many sequences of which length, and the command lines."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qnext_plugin.cli.plan_text import COMMANDS, GIB, text
from qnext_plugin.engines.config import ENGINES

DTYPES = ("float32", "bfloat16", "float16")
_CACHE_DTYPES = {"fp8": "float8_e4m3fn", "bfloat16": "bfloat16"}


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    plan = commands.add_parser(
        "plan",
        help="compute whether a model fits, and the command line for it",
        description="Compute memory, concurrency and the command lines for both engines from a model's config.json and "
        "the headers of its safetensors files. No weights are downloaded. The exit status is 1 if it does not fit "
        "on an engine that is asked for.",
        examples=(
            "qnext plan Qwen/Qwen3-Next-80B-A3B-Instruct --gpu-memory 141 --tensor-parallel-size 2 --mtp 2",
            "qnext plan MODEL --device cpu --memory 64 --context-length 32768",
        ),
    )
    plan.set_defaults(run=_run)
    plan.add_argument("model", metavar="MODEL", help="a local directory, or a name on the hub")
    plan.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model on the hub")
    plan.add_argument("--engine", choices=ENGINES, help="plan for this one alone (default: both)")
    plan.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="what serves (default: %(default)s)")
    plan.add_argument(
        "--gpu-memory", type=float, default=80, metavar="GIB", help="memory of each GPU (default: %(default)s)"
    )
    plan.add_argument(
        "--memory", type=float, metavar="GIB", help="memory of a machine that serves on its CPU (default: this one's)"
    )
    plan.add_argument(
        "--memory-bandwidth", type=float, metavar="GB/S", help="memory bandwidth of that machine, to estimate tokens/s"
    )
    plan.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="ranks (default: %(default)s)")
    plan.add_argument(
        "--context-length", type=int, metavar="N", help="tokens of the longest sequence (default: the checkpoint's)"
    )
    plan.add_argument("--mtp", type=int, default=0, metavar="N", help="draft tokens in each step (default: 0)")
    plan.add_argument("--dtype", choices=DTYPES, help="data type of the weights (default: the checkpoint's)")
    plan.add_argument(
        "--kv-cache-dtype",
        default="auto",
        choices=("auto", *_CACHE_DTYPES),
        help="data type of keys and values (default: the engine's)",
    )
    plan.add_argument("--state-dtype", choices=DTYPES, help="data type of recurrent states (default: the engine's)")
    plan.add_argument("--no-prefix-caching", action="store_true", help="plan without the prefix cache")
    plan.add_argument("--block-size", type=int, metavar="N", help="vLLM's flag; kernels on Blackwell need 128")
    plan.add_argument("--max-num-seqs", type=int, metavar="N", help="most sequences that run at once")
    plan.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.92,
        metavar="SHARE",
        help="vLLM's flag (default: %(default)s)",
    )
    plan.add_argument(
        "--mem-fraction-static", type=float, default=0.8, metavar="SHARE", help="SGLang's flag (default: %(default)s)"
    )
    plan.add_argument(
        "--reserve",
        type=float,
        metavar="GIB",
        help="memory for all but weights and caches (default: 3 on a GPU, for vLLM only; 4 on a CPU)",
    )
    plan.add_argument(
        "--cache-memory", type=float, metavar="GIB", help="memory for caches, instead of the estimates above"
    )
    plan.add_argument("--json", action="store_true", help="print all numbers as JSON")


def _run(args: argparse.Namespace) -> int:
    from qnext_plugin.checkpoint.stored import read_checkpoint  # imports torch

    plan = make_plan(args, read_checkpoint(args.model, args.revision))
    print(json.dumps(plan, indent=2) if args.json else text(args, plan))
    return 0 if all(engine["fits"] for engine in plan["engines"].values()) else 1


def make_plan(args: argparse.Namespace, metadata: Any) -> dict[str, Any]:
    """Return all numbers of the plan; bytes are on one rank."""
    import torch

    from qnext_plugin.config import QNextConfig
    from qnext_plugin.ops.instructions import multiplies_codes
    from qnext_plugin.plan.cpu import held
    from qnext_plugin.plan.sizes import Serving

    _check(args)
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
    headers = metadata.headers
    if args.device == "cpu":
        headers = held(metadata, serving, in_codes=multiplies_codes())
    weights = serving.weights(headers)
    plan: dict[str, Any] = {
        "model": args.model,
        "layers": {"gated attention": serving.num_full_attention_layers, "Gated DeltaNet": serving.num_gdn_layers},
        "dtype": named,
        "weights_from": "safetensors headers" if metadata.headers else "config.json",
        "quantized": "quantization_config" in metadata.config,
        "weights": weights,
        "context_length": args.context_length or config.max_position_embeddings,
        "trained_length": config.max_position_embeddings,
    }
    loading = 0
    if args.device == "cpu":
        plan["cpu"] = _cpu(args, serving, headers, metadata.headers)
        loading = plan["cpu"]["loading"]
    plan["engines"] = _engines(args, serving, metadata, plan, loading)
    for engine, numbers in plan["engines"].items():
        numbers["command"] = COMMANDS[engine](args, plan)
    if args.device == "cpu":
        plan["cpu"]["advice"] = _advice(args, serving, metadata, plan, loading)
    return plan


def _check(args: argparse.Namespace) -> None:
    names = ("gpu_memory", "memory", "memory_bandwidth", "cache_memory", "context_length", "block_size", "max_num_seqs")
    for name in names:
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected more than 0")
    if args.mtp < 0 or args.mtp >= 8:
        raise ValueError(f"--mtp is {args.mtp}, expected 0 to 7")


def _engines(
    args: argparse.Namespace, serving: Any, metadata: Any, plan: Mapping[str, Any], loading: int
) -> dict[str, dict[str, Any]]:
    """Return each engine's numbers; ``loading`` are the most bytes of weights at a time on a CPU."""
    from qnext_plugin.plan.caches import default_cache_dtype

    context, engines = plan["context_length"], {}
    lengths = sorted({n for n in (4**i for i in range(5, 12)) if n < context} | {context})
    for engine in [args.engine] if args.engine else ENGINES:
        divide = {"vllm": _vllm, "sglang": _sglang}[engine]
        kept = _CACHE_DTYPES.get(args.kv_cache_dtype) or _name(
            default_cache_dtype(engine, args.device, metadata.quantization) or serving.dtype
        )
        serving = replace(serving, kv_cache_dtype=_dtype(kept))
        numbers, cache, memory = divide(args, serving, metadata.config, sum(plan["weights"].values()))
        numbers |= {"kv_cache_dtype": kept, "kv_bytes_per_token": serving.kv_bytes_per_token}
        found = {str(n): min(cache.concurrency(memory, n), numbers["max_num_seqs"]) for n in lengths}
        engines[engine] = numbers | {"cache_memory": memory, "concurrency": found}
        too_large = args.device == "cpu" and args.cache_memory is None and loading > _cpu_memory(args)
        engines[engine]["fits"] = found[str(context)] >= 1 and not too_large
    return engines


def _cpu(args: argparse.Namespace, serving: Any, headers: Any, stored: Any) -> dict[str, Any]:
    """Return what a CPU holds while loading, and how fast it can decode at most; ``headers`` are of what it holds."""
    from qnext_plugin.plan.cpu import Decoding, largest_layer

    state_dtype = _dtype(args.state_dtype or "float32")
    rate, decoding = args.memory_bandwidth, []
    for drafts in sorted({0, args.mtp}):
        one = replace(serving, num_draft_tokens=drafts)
        state = one.state(one.dtype, state_dtype).page_bytes * one.num_gdn_layers
        traffic = Decoding(one, headers, state)
        for sequences in (1, 4, 8):
            step: dict[str, Any] = {"sequences": sequences, "drafts": drafts, "bytes": traffic.step(sequences)}
            if rate:
                steps = sequences * rate * 1e9 / step["bytes"]
                step["tokens_per_second"] = sorted({steps, steps * (1 + drafts)})
            decoding.append(step)
    return {
        "memory": _machine_memory(args),
        "memory_bandwidth": rate,
        "reserve": int(_reserve(args) * GIB),
        "stored": sum(serving.weights(stored).values()),
        "loading": sum(serving.weights(headers).values()) + largest_layer(serving, headers),
        "decoding": decoding,
    }


def _advice(args: argparse.Namespace, serving: Any, metadata: Any, plan: Mapping[str, Any], loading: int) -> list[str]:
    """Return which one change of the arguments would make a model fit that does not."""

    def fits(**changes: Any) -> bool:
        changed = argparse.Namespace(**vars(args) | changes)
        lengths = {"context_length": changed.context_length or plan["context_length"]}
        weights = plan["weights"] if changed.mtp else {k: v for k, v in plan["weights"].items() if k != "MTP draft"}
        one = replace(serving, num_draft_tokens=changed.mtp)
        engines = _engines(changed, one, metadata, {**plan, **lengths, "weights": weights}, loading)
        return all(numbers["fits"] for numbers in engines.values())

    if fits() or args.cache_memory is not None:
        return []
    sizes = (float(size) for power in range(3, 13) for size in (2**power, 3 * 2 ** (power - 1)))
    lengths = (2**power for power in reversed(range(10, 24)) if 2**power < plan["context_length"])
    shorter = next((length for length in lengths if fits(context_length=length)), None)
    larger = next((size for size in sizes if size > _machine_memory(args) / GIB and fits(memory=size)), None)
    return [
        *([f"--context-length {shorter}"] if shorter else []),
        *(["--mtp 0"] if args.mtp and fits(mtp=0) else []),
        *(["--no-prefix-caching"] if not args.no_prefix_caching and fits(no_prefix_caching=True) else []),
        *([f"a machine with {larger:g} GiB"] if larger else []),
    ]


def _vllm(args: argparse.Namespace, serving: Any, config: Mapping[str, Any], weights: int) -> tuple[Any, Any, int]:
    import torch

    from qnext_plugin.plan.caches import DEVICES, VllmCache, default_state_dtype

    state_dtype = args.state_dtype or _name(default_state_dtype("vllm", args.device, config, serving.dtype))
    device = DEVICES[args.device]
    cache = VllmCache(serving, getattr(torch, state_dtype), device, not args.no_prefix_caching, args.block_size)
    memory = _cache_memory(args, args.gpu_memory_utilization, weights, _reserve(args))
    # These are vLLM's defaults. On a CPU it captures no graphs, so it refuses nothing.
    default = 128 * args.tensor_parallel_size if args.device == "cpu" else 1024 if args.gpu_memory >= 70 else 256
    asked = args.max_num_seqs or default
    numbers = {
        "state_dtype": state_dtype,
        "state_bytes_per_sequence": cache.state_blocks * cache.block_bytes,
        "block_size": cache.block_size,
        "prefix_match_unit": cache.prefix_match_unit,
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
    # On a CPU our platform for SGLang lets 32 requests run.
    running = args.max_num_seqs or (32 if args.device == "cpu" else None)
    cache = SglangCache(serving, getattr(torch, state_dtype), prefix_caching, max_running_requests=running)
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


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _reserve(args: argparse.Namespace) -> float:
    from qnext_plugin.plan.cpu import RESERVE

    return args.reserve if args.reserve is not None else RESERVE if args.device == "cpu" else 3.0


def _machine_memory(args: argparse.Namespace) -> int:
    from qnext_plugin.plan.cpu import installed_memory

    return installed_memory() if args.memory is None else int(args.memory * GIB)


def _cpu_memory(args: argparse.Namespace) -> int:
    """Return the bytes that a rank has for weights and caches; the ranks share a machine's memory."""
    return (_machine_memory(args) - int(_reserve(args) * GIB)) // args.tensor_parallel_size


def _cache_memory(args: argparse.Namespace, share: float, weights: int, reserve: float) -> int:
    if args.cache_memory is not None:
        return int(args.cache_memory * GIB)
    if args.device == "cpu":
        return max(0, _cpu_memory(args) - weights)
    return max(0, int((args.gpu_memory * share - reserve) * GIB) - weights)
