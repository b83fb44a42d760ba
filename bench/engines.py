"""SGLang against vLLM, both with our model: fresh processes in turn (A B A B ...), medians of the ratios pair by pair.

python bench/engines.py MODEL --sglang PYTHON --vllm PYTHON [--pairs 3] [--dtype bfloat16] [--json FILE]

Each PYTHON is the interpreter of an environment with one of the engines and this package.
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
from collections.abc import Callable
from pathlib import Path

from native import DECODE, DECODE_PROMPT, DECODE_TOKENS, PREFILL  # the same workloads

ENGINES = ("sglang", "vllm")
MAX_MODEL_LEN = 4096  # also the tokens of one step, so that every prompt batch is one
Answer = Callable[[list[list[int]], int], None]
"""Answers prompts with so many tokens each."""


def sglang_engine(model: str, dtype: str) -> Answer:
    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(
        model_path=model,
        dtype=dtype,
        context_length=MAX_MODEL_LEN,
        chunked_prefill_size=MAX_MODEL_LEN,
        max_running_requests=8,
        disable_radix_cache=True,
        skip_tokenizer_init=True,
    )

    def answer(prompts: list[list[int]], tokens: int) -> None:
        engine.generate(
            input_ids=prompts, sampling_params={"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        )

    return answer


def vllm_engine(model: str, dtype: str) -> Answer:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=MAX_MODEL_LEN,
        max_num_seqs=8,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )

    def answer(prompts: list[list[int]], tokens: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)

    return answer


def measure(answer: Answer) -> dict[str, float]:
    """Tokens per second of each workload, best of two after a warm-up."""

    def best(batch: int, prompt: int, tokens: int) -> float:
        prompts = [[(i * 7919 + j * 104729) % 100_000 for j in range(prompt)] for i in range(batch)]
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            answer(prompts, tokens)
            seconds.append(time.perf_counter() - begin)
        return min(seconds[1:])

    rates = {name: batch * prompt / best(batch, prompt, 1) for name, (batch, prompt) in PREFILL.items()}
    for name, batch in DECODE.items():
        steps = best(batch, DECODE_PROMPT, DECODE_TOKENS + 1) - best(batch, DECODE_PROMPT, 1)
        rates[name] = batch * DECODE_TOKENS / steps
    return rates


def run(args: argparse.Namespace, engine: str) -> dict[str, float]:
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        env = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "2"}
        env.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        command = [getattr(args, engine), __file__, args.model, "--dtype", args.dtype, "--measure", engine, out.name]
        log = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if log.returncode:
            raise SystemExit(f"{engine} failed:\n{log.stdout[-5000:]}")
        serves = f"Qwen3NextForCausalLM is served by {engine}_ext.model"
        if serves not in log.stdout:
            raise SystemExit(f"expected in {engine}'s log: {serves}\n{log.stdout[-5000:]}")
        rates: dict[str, float] = json.loads(Path(out.name).read_text())
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for engine in ENGINES:
        parser.add_argument(f"--{engine}", metavar="PYTHON", default=sys.executable, help="default: this one")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        engine, out = args.measure
        answer = sglang_engine if engine == "sglang" else vllm_engine
        Path(out).write_text(json.dumps(measure(answer(args.model, args.dtype))))
        sys.stdout.flush()
        os._exit(0)  # SGLang's shutdown can wait for ever; its processes end with this one

    pairs = []
    for i in range(args.pairs):
        pairs.append([run(args, engine) for engine in ENGINES])
        print(f"pair {i + 1} of {args.pairs} done", flush=True)
    table = {}
    print(f"{'workload':16} {'SGLang tok/s':>13} {'vLLM tok/s':>11} {'ratio median (min-max)':>24}")
    for name in [*PREFILL, *DECODE]:
        sglang, vllm = ([side[name] for side in sides] for sides in zip(*pairs, strict=True))
        ratios = [a / b for a, b in zip(sglang, vllm, strict=True)]
        table[name] = {"sglang": sglang, "vllm": vllm, "ratio": statistics.median(ratios)}
        spread = f"{table[name]['ratio']:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{name:16} {statistics.median(sglang):13.1f} {statistics.median(vllm):11.1f} {spread:>24}")
    if args.json:
        about = {
            "command": f"python bench/engines.py --pairs {args.pairs} --dtype {args.dtype}",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "date": time.strftime("%Y-%m-%d"),
        }
        args.json.write_text(json.dumps(about | {"workloads": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
