"""Our vLLM model against vLLM's own, measured in turn (A B A B ...), medians of the ratios pair by pair.

python bench/native.py MODEL [--pairs 3] [--dtype bfloat16] [--eager] [--mtp N] [--resident] [--json FILE]

Each measurement is in a fresh process, or with ``--resident``, which is for GPUs, in one of two that stay.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

# Prompts (batch, tokens of each), and batches of decodes after a short prompt; on a GPU larger ones.
PREFILL = {"prefill 4x512": (4, 512), "prefill 1x2000": (1, 2000)}
DECODE = {"decode batch 1": 1, "decode batch 4": 4, "decode batch 8": 8}
DECODE_PROMPT, DECODE_TOKENS = 32, 32
GPU_PREFILL = {"prefill 8x2048": (8, 2048), "prefill 1x8000": (1, 8000)}
GPU_DECODE = {"decode batch 1": 1, "decode batch 8": 8, "decode batch 64": 64}
GPU_DECODE_TOKENS = 128


def serve(args: argparse.Namespace) -> None:
    """Load the model, then answer every line of input with the tokens per second of each workload, best of two."""
    import torch
    from vllm import LLM, SamplingParams

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's log, which would fill the pipe while nobody reads
    gpu = torch.cuda.is_available()
    more: dict[str, Any] = {"gpu_memory_utilization": 0.15, "kv_cache_memory_bytes": 5 << 30} if gpu else {}
    begin = time.perf_counter()
    llm = LLM(
        args.model,
        dtype=args.dtype,
        enforce_eager=args.eager,
        max_model_len=8192 if gpu else 4096,
        max_num_seqs=64 if gpu else 8,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        speculative_config={"method": "qwen3_next_mtp", "num_speculative_tokens": args.mtp} if args.mtp else None,
        additional_config={"gdn_prefill_backend": args.prefill_backend},
        **more,
    )
    started = time.perf_counter() - begin
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    vocab = llm.llm_engine.vllm_config.model_config.get_vocab_size()

    def generate(batch: int, prompt: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": [(i * 7919 + j * 104729) % vocab for j in range(prompt)]} for i in range(batch)]
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begin

    def best(*workload: int) -> float:
        generate(*workload)
        return min(generate(*workload) for _ in range(2))

    for _ in sys.stdin:
        prefills, decodes = (GPU_PREFILL, GPU_DECODE) if gpu else (PREFILL, DECODE)
        tokens = GPU_DECODE_TOKENS if gpu else DECODE_TOKENS
        rates = {name: batch * prompt / best(batch, prompt, 1) for name, (batch, prompt) in prefills.items()}
        for name, batch in decodes.items():
            steps = best(batch, DECODE_PROMPT, tokens + 1) - best(batch, DECODE_PROMPT, 1)
            rates[name] = batch * tokens / steps
        found = {"class": type(runner.model).__module__, "start-up seconds": started, "tokens per second": rates}
        print(json.dumps(found), file=answers, flush=True)


class Side:
    """A process that serves one of the two models; it starts at once and loads in the background."""

    def __init__(self, args: argparse.Namespace, native: bool) -> None:
        self.native = native
        env = os.environ | {"QNEXT_DISABLE": "1" if native else "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        env.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        command = [sys.executable, __file__, args.model, "--dtype", args.dtype, "--mtp", str(args.mtp), "--serve"]
        command += ["--prefill-backend", args.prefill_backend, *(["--eager"] if args.eager else [])]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def measure(self) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):
            print("go", file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{'native' if self.native else 'ours'} failed:\n{self.log.read()[-6000:]}")
        result = json.loads(line)
        if result["class"].startswith("vllm_ext") == self.native:
            raise RuntimeError(f"expected {'native' if self.native else 'our'} model, but {result['class']} served")
        return result

    def end(self) -> None:
        with suppress(BrokenPipeError):
            self.process.communicate()  # closes its input, which ends it
        self.log.close()


def fresh(args: argparse.Namespace, native: bool) -> dict[str, Any]:
    side = Side(args, native)
    try:
        return side.measure()
    finally:
        side.end()


def summary(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By workload: tokens per second of both, run by run, and the median of their ratios."""
    table = {}
    for name in pairs[0][0]["tokens per second"]:
        ours, native = ([side["tokens per second"][name] for side in sides] for sides in zip(*pairs, strict=True))
        ratios = [a / b for a, b in zip(ours, native, strict=True)]
        table[name] = {"ours": ours, "native": native, "ratio": statistics.median(ratios)}
    return table


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--mtp", type=int, default=0, help="draft tokens a step; with random weights none is accepted")
    parser.add_argument("--prefill-backend", default="auto", help="vLLM's --gdn-prefill-backend, on a GPU")
    parser.add_argument("--resident", action="store_true", help="two processes that stay, instead of fresh ones")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if args.serve:
        serve(args)
        return
    sides = [Side(args, native) for native in (False, True)] if args.resident else []
    pairs = []
    try:
        for i in range(args.pairs):
            if sides:
                pairs.append((sides[0].measure(), sides[1].measure()))
            else:
                pairs.append((fresh(args, native=False), fresh(args, native=True)))
            print(f"pair {i + 1} of {args.pairs} done", flush=True)
    finally:
        for side in sides:
            side.end()
    table = summary(pairs)
    print(f"{'workload':16} {'ours tok/s':>11} {'native tok/s':>13} {'ratio median (min-max)':>24}")
    for name, row in table.items():
        ratios = [a / b for a, b in zip(row["ours"], row["native"], strict=True)]
        spread = f"{row['ratio']:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        ours, native = statistics.median(row["ours"]), statistics.median(row["native"])
        print(f"{name:16} {ours:11.1f} {native:13.1f} {spread:>24}")
    if args.json:
        from vllm import __version__

        about = {
            "command": "python " + " ".join(a for a in sys.argv if not a.startswith("/")),
            "vllm": __version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "date": time.strftime("%Y-%m-%d"),
            "classes": [pairs[0][0]["class"], pairs[0][1]["class"]],
        }
        args.json.write_text(json.dumps(about | {"workloads": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
