"""Ours on vLLM against llama.cpp on the same weights, on a CPU.

    python -m bench.llama_cpp MODEL [--pairs 2] [--json FILE]

In an environment with vLLM, with a C++ compiler. llama.cpp is that of the PyPI sdist of llama-cpp-python, built for
this machine in the cache folder of ``scripts/setup``. Before anything is timed, its log-probabilities of the demo
checkpoint are compared with those of ``transformers``. Then each workload of ``bench.step`` is measured on ours and on
llama.cpp, one after the other with a thread for each core, the best of a few each; every pair in fresh processes.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.step import WORKLOADS, measured, started

VERSION = "0.3.36"
CACHE = os.environ.get("QNEXT_ENVS") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "qnext-plugin"
WORK = Path(CACHE).expanduser() / f"llama-cpp-python-{VERSION}"
SOURCE = WORK / f"llama_cpp_python-{VERSION}"
LLAMA_CPP = SOURCE / "vendor" / "llama.cpp"
BINARIES = WORK / "cmake" / "bin"
PROGRAMS = ("llama-batched-bench", "llama-bench", "llama-quantize")
THREADS = str(len(os.sched_getaffinity(0)))
ROUNDS = 2
MICROBATCHES = ("512", "2048")
"""Tokens that llama.cpp computes at once: its default, and as many as vLLM does. The better counts."""


def build(native: bool = True) -> Path:
    """Return the folder of llama.cpp's ``PROGRAMS``: its defaults, for this machine's instructions or for AVX2."""
    binaries = BINARIES if native else WORK / "cmake-avx2" / "bin"
    if all((binaries / program).exists() for program in PROGRAMS):
        return binaries
    WORK.mkdir(parents=True, exist_ok=True)
    pip, tools = [sys.executable, "-m", "pip"], WORK / "tools"
    wanted = f"llama-cpp-python=={VERSION}"
    run([*pip, "download", wanted, "--no-binary", "llama-cpp-python", "--no-deps", "--dest", str(WORK)])
    with tarfile.open(SOURCE.with_suffix(SOURCE.suffix + ".tar.gz")) as sdist:
        sdist.extractall(WORK, filter="data")
    run([*pip, "install", "--target", str(tools), "cmake", "ninja", "diskcache"])  # the last for its Python bindings
    options = ["BUILD_TYPE=Release", "MAKE_PROGRAM=" + str(tools / "bin" / "ninja")]
    options = [f"-DCMAKE_{option}" for option in options] + [
        f"-DGGML_NATIVE={'ON' if native else 'OFF'}",
        "-DBUILD_SHARED_LIBS=ON",
    ]
    options += [f"-DLLAMA_{part}=OFF" for part in ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER", "OPENSSL")]
    cmake = [str(tools / "bin" / "cmake")]
    run([*cmake, "-S", str(LLAMA_CPP), "-B", str(binaries.parent), "-G", "Ninja", *options], PYTHONPATH=str(tools))
    run([*cmake, "--build", str(binaries.parent), "-j", THREADS, "--target", *PROGRAMS], PYTHONPATH=str(tools))
    return binaries


def convert(model: Path, gguf: Path) -> Path:
    """By llama.cpp's own script, without MTP, which is not measured, and without a tokenizer, which is not needed."""
    if not gguf.exists():
        part = gguf.with_suffix(".part")
        code = (
            "from conversion.qwen import Qwen3NextModel as Model; import convert_hf_to_gguf\n"
            "def set_vocab(self):\n"
            "    self._set_vocab_none(); self.gguf_writer.add_vocab_size(self.hparams['vocab_size'])\n"
            "Model.set_vocab = set_vocab; convert_hf_to_gguf.main()"
        )
        arguments = [str(model), "--outfile", str(part), "--outtype", "bf16", "--no-mtp"]
        run([sys.executable, "-c", code, *arguments], PYTHONPATH=f"{LLAMA_CPP}:{LLAMA_CPP / 'gguf-py'}")
        part.rename(gguf)
    return gguf


def check() -> dict[str, float]:
    """Mean error of log-probabilities of the demo checkpoint, of llama.cpp and of ``transformers`` in bfloat16.

    Both against ``transformers`` in float32, on prompts computed at once and on tokens decoded one by one after them.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from qnext_plugin.checkpoint.make_demo import DIRECTORY
    from qnext_plugin.verify.scenarios import tokens
    from qnext_plugin.verify.tolerances import LOGPROB_BFLOAT16_RATIO

    prompts = [tokens(length, length, 1024) for length in (9, 70, 333)]
    with tempfile.TemporaryDirectory() as scratch:
        theirs = logprobs(BINARIES, convert(DIRECTORY, Path(scratch) / "demo.gguf"), prompts)

    def transformers(dtype: torch.dtype) -> list[torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=dtype)
        with torch.inference_mode():
            return [model(torch.tensor([prompt])).logits[0].float().log_softmax(-1) for prompt in prompts]

    exact, rounded = transformers(torch.float32), transformers(torch.bfloat16)

    def error(found: list[torch.Tensor]) -> float:
        return torch.cat([(a - b).abs().flatten() for a, b in zip(found, exact, strict=True)]).mean().item()

    errors = {"llama.cpp": error(theirs), "transformers in bfloat16": error(rounded)}
    print("mean error of log-probabilities:", errors, flush=True)
    if errors["llama.cpp"] > LOGPROB_BFLOAT16_RATIO * errors["transformers in bfloat16"]:
        raise ValueError(f"llama.cpp computes another model: {errors}")
    return errors


def logprobs(binaries: Path, gguf: Path, prompts: Sequence[Sequence[int]]) -> list[Any]:
    """Of each prompt ``[tokens, vocab_size]``; the last eight tokens are decoded one by one."""
    import numpy as np
    import torch

    os.environ["LLAMA_CPP_LIB_PATH"] = str(binaries)
    sys.path[:0] = [str(SOURCE), str(WORK / "tools")]
    from llama_cpp import llama_cpp as lib
    from llama_cpp._logger import set_verbose

    set_verbose(False)
    model = lib.llama_model_load_from_file(bytes(gguf), lib.llama_model_default_params())
    vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = 1024
    context = lib.llama_init_from_model(model, params)
    batch = lib.llama_batch_init(1024, 0, 1)

    def step(ids: Sequence[int], start: int) -> torch.Tensor:
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        status = lib.llama_decode(context, batch)
        assert status == 0, f"llama_decode: {status}"
        logits = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(ids), vocab_size))
        return torch.tensor(logits).log_softmax(-1)

    def steps(prompt: Sequence[int]) -> Iterator[torch.Tensor]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        yield step(prompt[:-8], 0)
        yield from (step(prompt[i : i + 1], i) for i in range(len(prompt) - 8, len(prompt)))

    return [torch.cat(list(steps(prompt))) for prompt in prompts]


def theirs(binaries: Path, gguf: Path, batch: int, length: int, output: int = 0) -> Iterator[float]:
    """Tokens per second, by llama-bench of one sequence and by llama-batched-bench of several, each a few times."""
    model = ["-m", str(gguf), "-t", THREADS]
    for microbatch in MICROBATCHES[: 1 if output else None]:
        if batch == 1:
            what = ["-p", "0", "-n", str(output), "-d", str(length)] if output else ["-p", str(length), "-n", "0"]
            out = run(
                [str(binaries / "llama-bench"), *model, *what, "-ub", microbatch, "-r", str(ROUNDS), "-o", "json"]
            )
            yield from json.loads(out)[0]["samples_ts"]
        else:
            lengths = ["-npp", str(length), "-ntg", str(output or 1), "-npl", ",".join([str(batch)] * ROUNDS)]
            room = ["-c", str(batch * (length + (output or 1))), "-b", "2048", "-ub", microbatch]
            command = [str(binaries / "llama-batched-bench"), *model, *lengths, *room, "--output-format", "jsonl"]
            for line in run(command).splitlines():
                if line.startswith("{"):
                    yield json.loads(line)["speed_tg" if output else "speed_pp"]


def compared(model: Path, gguf: Path, pairs: int) -> dict[str, Any]:
    """What ``bench/tables.py`` renders: rates, ratios, limits, and decode steps taken apart."""
    from qnext_plugin.bench import report
    from qnext_plugin.bench.limits import add_limits
    from qnext_plugin.bench.side import Side, Task
    from qnext_plugin.cli.bench import measured_ceilings

    both: list[dict[str, Any]] = []
    rates = []
    for _ in range(pairs):
        with tempfile.TemporaryDirectory() as scratch:
            rates.append(measured_ceilings("bfloat16", Path(scratch)))
        pair: dict[str, Any] = {"ours": {"workloads": {}}, "llama.cpp": {"workloads": {}}}
        with started("vllm", model) as remote:
            for name, workload in WORKLOADS.items():
                pair["ours"]["workloads"][name] = measured(remote, model, name)
                found = list(theirs(BINARIES, gguf, **workload))
                pair["llama.cpp"]["workloads"][name] = {report.RATE: max(found), "each": found}
        both.append(pair)
        print(json.dumps(rates[-1] | pair), flush=True)
    result: dict[str, Any] = {
        "model": model.name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "sides": ["ours", "llama.cpp"],
        "engines": {
            "ours": f"vllm {Side('ours', 'vllm').version}",
            "llama.cpp": f"llama.cpp of llama-cpp-python {VERSION}",
        },
        "ranks": 1,
        "dtype": "bfloat16",
        "ceilings": {name: max(each[name] for each in rates) for name in rates[0]},
        "workloads": report.summary(both),
    }
    add_limits(result["workloads"], {"ours": "vllm"}, result["ceilings"], model, Task(str(model), WORKLOADS))
    result["decode steps"] = {
        name: {
            "limit ms": 1e3 * workload["batch"] / result["workloads"][name]["limit"]["ours"],
            **{key: [pair["ours"]["workloads"][name][key] for pair in both] for key in ("model ms", "step ms")},
            "llama.cpp ms": [
                1e3 * workload["batch"] / pair["llama.cpp"]["workloads"][name][report.RATE] for pair in both
            ],
        }
        for name, workload in WORKLOADS.items()
        if "output" in workload
    }
    return result


def run(command: Sequence[str], **environment: str) -> str:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    build()
    errors = check()
    gguf = convert(args.model, WORK / f"{args.model.name}.gguf")
    command = f"python -m bench.llama_cpp {args.model.name} --pairs {args.pairs}"
    found = (
        {"kind": "llama.cpp", "command": command}
        | compared(args.model, gguf, args.pairs)
        | {"mean error of log-probabilities": errors}
    )
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
