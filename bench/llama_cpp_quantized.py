"""Quantized weights on a CPU: ours on vLLM in published formats, llama.cpp in its own, made of the same checkpoint.

    python -m bench.llama_cpp_quantized MODEL [--pairs 2] [--avx2] [--json FILE]

MODEL is a checkpoint in bfloat16; the copies stand beside it. Head and embeddings stay in bfloat16 on both sides. Each
pair runs every form once, in fresh processes, with a thread for each core. Beside the speeds stand the mean errors of
the 256 most likely ids' log-probabilities against ``transformers`` in float32 on the unquantized weights. ``--avx2``
runs what a CPU with AVX2 alone would. The rest is as in ``bench.llama_cpp``.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import llama_cpp, step

LENGTHS = (9, 70, 333)
NAMES = ("decode batch 1", "decode batch 4", "decode batch 8", "prefill 4x512")
FORMS = {
    "16 bits": {"ours": ("bfloat16",), "llama.cpp": ("BF16",)},
    "8 bits": {"ours": ("fp8-block", "w8a8"), "llama.cpp": ("Q8_0",)},
    "4 bits": {"ours": ("w4a16", "mxfp4"), "llama.cpp": ("Q4_0", "Q4_K_M", "IQ4_NL")},
}
OURS, THEIRS = ([form for sides in FORMS.values() for form in sides[side]] for side in ("ours", "llama.cpp"))
AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+sse4.2,+popcnt",
}


def quantize(model: Path, binaries: Path, format: str) -> Path:
    """Return ``model`` in a format of ours or a type of llama.cpp's; ``BF16`` and ``bfloat16`` are the model itself."""
    from qnext_plugin.checkpoint.make_quantized import quantize_checkpoint
    from qnext_plugin.checkpoint.quantizers import FORMATS

    if format == "bfloat16":
        return model
    if format in FORMATS:
        target = model.with_name(f"{model.name}-{format}")
        if not target.exists():
            quantize_checkpoint(model, target, format=format)
        return target
    gguf = llama_cpp.convert(model, model.with_name(f"{model.name}-BF16.gguf"))
    target = model.with_name(f"{model.name}-{format}.gguf")
    if not target.exists():
        keep = ["--output-tensor-type", "bf16", "--token-embedding-type", "bf16"]
        llama_cpp.run([str(binaries / "llama-quantize"), *keep, str(gguf), str(target), format])
    return target


def error(found: Sequence[Any], exact: Sequence[Any]) -> float:
    """Mean over ``(ids, logprobs)`` of each prompt, both ``[tokens, 256]``, against ``[tokens, vocab_size]``."""
    import torch

    errors = [logprobs - every.gather(1, ids) for (ids, logprobs), every in zip(found, exact, strict=True)]
    return torch.cat(errors).abs().mean().item()


def rate(name: str, step_ms: float) -> float:
    """Tokens per second of all sequences."""
    workload = step.WORKLOADS[name]
    return workload["batch"] * (1 if "output" in workload else workload["length"]) / step_ms * 1e3


def measure_ours(model: Path, prompts: Sequence[Sequence[int]]) -> tuple[dict[str, Any], list[Any]]:
    from qnext_plugin.verify.comparison import Result
    from qnext_plugin.verify.scenarios import Scenario

    scenario = Scenario((tuple(map(tuple, prompts)),), max_tokens=(1,), prompt_logprobs=True)
    with step.started("vllm", model) as remote, tempfile.TemporaryDirectory() as scratch:
        found: dict[str, Any] = {name: rate(name, step.measured(remote, model, name)["step ms"]) for name in NAMES}
        file = Path(scratch) / "answers"
        remote.call(
            "qnext_plugin.verify.worker:run",
            step.TIMEOUT,
            scenario=vars(scenario),
            mutant="",
            reset=False,
            file=str(file),
        )
        found["kernels"] = remote.serving(step.TIMEOUT)["kernels"]
        (answers,) = Result.load(file).batches
    return found, [(answer.ids, answer.logprobs) for answer in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--avx2", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.avx2:
        os.environ |= AVX2 | {"PYTHONPATH": f"{Path(__file__).parent / 'avx2'}:{os.environ['PYTHONPATH']}"}
    import torch

    from qnext_plugin.bench.side import Side
    from qnext_plugin.cli.bench import measured_ceilings
    from qnext_plugin.config import QNextConfig
    from qnext_plugin.verify.reference import Whole
    from qnext_plugin.verify.scenarios import tokens

    binaries = llama_cpp.build(native=not args.avx2)
    files = {form: quantize(args.model, binaries, form) for form in (*OURS, *THEIRS)}
    vocab_size = QNextConfig.from_pretrained(str(args.model)).vocab_size
    prompts = [tokens(length, length, vocab_size) for length in LENGTHS]
    reference = Whole(args.model)
    exact = []
    with torch.inference_mode():
        for prompt in prompts:
            exact.append(reference.model(torch.tensor([prompt])).logits[0].float().log_softmax(-1))
    del reference
    rates: dict[str, dict[str, list[float]]] = {name: {form: [] for form in files} for name in NAMES}
    errors, kernels, ceilings = {}, {}, []
    for _ in range(args.pairs):
        with tempfile.TemporaryDirectory() as scratch:
            ceilings.append(measured_ceilings("bfloat16", Path(scratch)))
        for form, file in files.items():
            if form in OURS:
                found, answers = measure_ours(file, prompts)
                kernels[form] = found.pop("kernels")
            else:
                found = {n: max(llama_cpp.theirs(binaries, file, **step.WORKLOADS[n])) for n in NAMES}
                tops = [rows.topk(256) for rows in llama_cpp.logprobs(binaries, file, prompts)]
                answers = [(top.indices, top.values) for top in tops]
            errors[form] = error(answers, exact)
            for name in NAMES:
                rates[name][form].append(found[name])
            print(form, {name: rates[name][form][-1] for name in NAMES}, errors[form], flush=True)
    result = {
        "kind": "llama.cpp quantized",
        "command": f"python -m bench.llama_cpp_quantized {args.model.name} --pairs {args.pairs}"
        + " --avx2" * args.avx2,
        "model": args.model.name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "engines": {"ours": f"vllm {Side('ours', 'vllm').version}", "llama.cpp": llama_cpp.VERSION},
        "ceilings": {name: max(each[name] for each in ceilings) for name in ceilings[0]},
        "forms": FORMS,
        "kernels": kernels,
        "bytes": {form: size(file) for form, file in files.items()},
        "errors": errors,
        "workloads": rates,
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def size(file: Path) -> int:
    return sum(part.stat().st_size for part in (file.glob("*.safetensors") if file.is_dir() else [file]))


if __name__ == "__main__":
    main()
