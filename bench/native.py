"""Our vLLM model against vLLM's own: fresh processes in turn (A B A B ...), medians of the ratios pair by pair.

python bench/native.py MODEL [--pairs 3] [--dtype bfloat16] [--eager] [--json FILE]
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
from pathlib import Path

PREFILL = {"prefill 4x512": (4, 512), "prefill 1x2000": (1, 2000)}
DECODE = {"decode batch 1": 1, "decode batch 4": 4, "decode batch 8": 8}
DECODE_PROMPT, DECODE_TOKENS = 32, 32


def measure(model: str, dtype: str, eager: bool, mtp: int) -> dict[str, object]:
    """Tokens per second of each workload, best of two after a warm-up, in this process."""
    from vllm import LLM, SamplingParams

    begin = time.perf_counter()
    llm = LLM(
        model,
        dtype=dtype,
        enforce_eager=eager,
        max_model_len=4096,
        max_num_seqs=8,
        enable_prefix_caching=False,
        speculative_config={"method": "qwen3_next_mtp", "num_speculative_tokens": mtp} if mtp else None,
    )
    started = time.perf_counter() - begin
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    vocab = runner.model_config.get_vocab_size()

    def generate(batch: int, prompt: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": [(i * 7919 + j * 104729) % vocab for j in range(prompt)]} for i in range(batch)]
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begin

    def best(*workload: int) -> float:
        generate(*workload)
        return min(generate(*workload) for _ in range(2))

    rates = {name: batch * prompt / best(batch, prompt, 1) for name, (batch, prompt) in PREFILL.items()}
    for name, batch in DECODE.items():
        steps = best(batch, DECODE_PROMPT, DECODE_TOKENS + 1) - best(batch, DECODE_PROMPT, 1)
        rates[name] = batch * DECODE_TOKENS / steps
    return {"class": type(runner.model).__module__, "start-up seconds": started, "tokens per second": rates}


def run(args: argparse.Namespace, native: bool) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        env = os.environ | {"QNEXT_DISABLE": "1" if native else "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        env.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        command = [sys.executable, __file__, args.model, "--dtype", args.dtype, "--mtp", str(args.mtp)]
        command += ["--measure-to", out.name, *(["--eager"] if args.eager else [])]
        log = subprocess.run(command, env=env, capture_output=True, text=True)
        if log.returncode:
            raise SystemExit(f"{'native' if native else 'ours'} failed:\n{log.stdout[-2000:]}\n{log.stderr[-4000:]}")
        result = json.loads(Path(out.name).read_text())
    serves = result["class"]
    if serves.startswith("vllm_ext") == native:
        raise SystemExit(f"expected {'native' if native else 'our'} model, but {serves} served")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--mtp", type=int, default=0, help="draft tokens a step; with random weights none is accepted")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure-to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_to:
        args.measure_to.write_text(json.dumps(measure(args.model, args.dtype, args.eager, args.mtp)))
        return

    pairs = []
    for i in range(args.pairs):
        pairs.append((run(args, native=False), run(args, native=True)))
        print(f"pair {i + 1} of {args.pairs} done", flush=True)
    table = {}
    print(f"{'workload':16} {'ours tok/s':>11} {'native tok/s':>13} {'ratio median (min-max)':>24}")
    for name in [*PREFILL, *DECODE]:
        ours, native = ([side["tokens per second"][name] for side in sides] for sides in zip(*pairs, strict=True))
        ratios = [a / b for a, b in zip(ours, native, strict=True)]
        table[name] = {"ours": ours, "native": native, "ratio": statistics.median(ratios)}
        spread = f"{table[name]['ratio']:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{name:16} {statistics.median(ours):11.1f} {statistics.median(native):13.1f} {spread:>24}")
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
