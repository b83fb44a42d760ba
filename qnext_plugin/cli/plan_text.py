"""The text of ``qnext plan``: its report, and a command line for each engine."""

import argparse
import shlex
from collections.abc import Mapping
from typing import Any

from qnext_plugin.engines.config import mtp_flags

GIB = 2**30
BAR = 24


def text(args: argparse.Namespace, plan: Mapping[str, Any]) -> str:
    """Return the numbers of ``cli.plan.make_plan`` as lines for people."""
    layers = " and ".join(f"{count} {kind}" for kind, count in plan["layers"].items())
    total = sum(plan["weights"].values())
    lines = [
        f"{plan['model']}: {layers} layers{' with the draft' * bool(args.mtp)}, {plan['dtype']}",
        "",
        f"Each of {args.tensor_parallel_size} GPUs" if args.device == "cuda" else "Each rank",
        f"  weights              {total / GIB:9.2f} GiB   (from {plan['weights_from']})",
        *(f"    {kind:<18} {size / GIB:9.2f} GiB" for kind, size in plan["weights"].items()),
    ]
    if plan["quantized"] and plan["weights_from"] == "config.json" and args.device == "cuda":
        lines.append("  this checkpoint is quantized: without its headers the weights above are too large")
    lines += _cpu_text(args, plan) if args.device == "cpu" else []
    described = {"vllm": ("vLLM", _vllm_text), "sglang": ("SGLang", _sglang_text)}
    names = [described[engine][0] for engine in plan["engines"]]
    for engine, numbers in plan["engines"].items():
        name, describe = described[engine]
        lines += ["", f"{name}, {numbers['cache_memory'] / GIB:.1f} GiB for caches"]
        lines += describe(args, plan, numbers) if numbers["cache_memory"] else ["  the weights do not fit"]
    columns = "   ".join(f"{name:<{BAR + 9}}" for name in names).rstrip()
    lines += ["", "Sequences at once", f"  {'tokens each':>11}   {columns}"]
    found = [numbers["concurrency"] for numbers in plan["engines"].values()]
    largest = max(1, *(max(concurrency.values()) for concurrency in found))
    for length in found[0]:
        bars = (_bar(concurrency[length], largest) for concurrency in found)
        lines.append(f"  {int(length):>11,}   {'   '.join(bars)}".rstrip())
    return "\n".join(lines)


def _cpu_text(args: argparse.Namespace, plan: Mapping[str, Any]) -> list[str]:
    cpu = plan["cpu"]
    lines = [
        f"  while loading        {cpu['loading'] / GIB:9.2f} GiB   (a layer is held twice while it is packed)",
        f"  everything else      {cpu['reserve'] / GIB:9.2f} GiB   (--reserve: the system and the engine's processes)",
    ]
    if plan["quantized"]:
        dequantized = sum(plan["weights"].values()) > 1.1 * cpu["stored"]
        why = "   (this CPU cannot multiply all of it as stored)" * dequantized
        lines.append(f"  in the checkpoint    {cpu['stored'] / GIB:9.2f} GiB{why}")
    rate = cpu["memory_bandwidth"]
    lines += ["", "Decoding, at most" if rate else "Decoding (give --memory-bandwidth for tokens per second)"]
    lines.append(f"  {'sequences':>9} {'GB a step':>10}" + f" {'tokens/s':>9}" * bool(rate))
    for step in cpu["decoding"]:
        drafts = f"   with {step['drafts']} drafts, of none to all accepted" * bool(step["drafts"])
        speed = "-".join(f"{speed:.1f}" for speed in step.get("tokens_per_second", []))
        lines.append(f"  {step['sequences']:9} {step['bytes'] / 1e9:10.2f} {speed:>9}{drafts}".rstrip())
    return [*lines, *(["", "To make it fit", *(f"  {line}" for line in cpu["advice"])] if cpu["advice"] else [])]


def _keys_and_values(engine: Mapping[str, Any]) -> str:
    return f"  keys and values      {engine['kv_bytes_per_token']:9,} bytes per token, {engine['kv_cache_dtype']}"


def _vllm_text(args: argparse.Namespace, plan: Mapping[str, Any], vllm: Mapping[str, Any]) -> list[str]:
    block = f"{vllm['block_size']:,} tokens"
    lines = [
        _keys_and_values(vllm),
        f"  states               {vllm['state_bytes_per_sequence'] / 2**20:9.1f} MiB per sequence, "
        f"{vllm['state_dtype']}",
        f"  attention block      {block:>9}: prefixes are found again in whole blocks, so shorter prompts never hit; "
        f"--prefix-match-unit {vllm['prefix_match_unit']} finds them",
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
    return [*lines, f"  {sglang['command']}"]


def _bar(value: float, largest: float) -> str:
    number = f"{int(value):,}" if value >= 1 else "none fits"
    return f"{'█' * max(1, round(BAR * value / largest)) if value >= 1 else '':<{BAR}} {number:<8}"


def _vllm_command(args: argparse.Namespace, plan: Mapping[str, Any]) -> str:
    numbers = plan["engines"]["vllm"]
    words = ["vllm", "serve", args.model, *_tensor_parallel(args, "--tensor-parallel-size")]
    words += ["--max-model-len", str(plan["context_length"])]
    if args.device == "cuda":
        words += ["--gpu-memory-utilization", f"{args.gpu_memory_utilization:g}"]
    else:
        words += ["--kv-cache-memory-bytes", str(numbers["cache_memory"])]
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
    if args.device == "cuda":
        words += ["--mem-fraction-static", f"{args.mem_fraction_static:g}"]
    else:
        numbers = plan["engines"]["sglang"]
        pools = {"running_requests": "--max-running-requests", "num_slots": "--max-mamba-cache-size"}
        pools |= {"num_tokens": "--max-total-tokens"}
        words += [word for name, flag in pools.items() for word in (flag, str(numbers[name]))]
    names = {"dtype": "--dtype", "state_dtype": "--mamba-ssm-dtype"}
    if args.device == "cuda":
        names |= {"max_num_seqs": "--max-running-requests"}
    words += _given(args, names)
    cache_dtype = "fp8_e4m3" if args.kv_cache_dtype == "fp8" else args.kv_cache_dtype
    words += ["--kv-cache-dtype", cache_dtype] if cache_dtype != "auto" else []
    words += ["--disable-radix-cache"] if args.no_prefix_caching else []
    words += mtp_flags("sglang", args.mtp)
    longer = plan["context_length"] > plan["trained_length"]
    return "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1 " * longer + shlex.join(words)


COMMANDS = {"vllm": _vllm_command, "sglang": _sglang_command}


def _tensor_parallel(args: argparse.Namespace, flag: str) -> list[str]:
    return [flag, str(args.tensor_parallel_size)] if args.tensor_parallel_size > 1 else []


def _given(args: argparse.Namespace, flags: Mapping[str, str]) -> list[str]:
    return [word for name, flag in flags.items() if getattr(args, name) for word in (flag, str(getattr(args, name)))]
