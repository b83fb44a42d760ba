"""One engine start on a GPU with the plugin, its whole distributions against ``transformers``:
``python -m bench.gpu_check.engines START [--out FILE] [--deadline UNIX-TIME]``.

Greedy answers with MTP are the same as without exactly if both choose what the reference prefers, which ``wrong``
counts. The draft of these checkpoints guesses the next token from the last one alone, as the model nearly does, so that
some drafts are accepted and some are not, in any model runner and without a hand in the engine.
"""

import argparse
import fcntl
import os
import pkgutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_check.report import Report
from qnext_plugin.engines.config import MAX_MODEL_LEN, EngineConfig
from qnext_plugin.verify.scenarios import Scenario, tokens
from tests.support.matrix import SCENARIOS

PIECEWISE, FULL = {"cudagraph_mode": "PIECEWISE"}, {"cudagraph_mode": "FULL_AND_PIECEWISE"}
SIZES = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}

# The 80B's layers and heads; fewer layers, experts and ids, for time. "tiny" has states so small that a block is short.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "tiny": {
        "preset": "tiny",
        "dtype": "float32",
        "overrides": {"linear_key_head_dim": 16, "linear_value_head_dim": 24, "max_position_embeddings": MAX_MODEL_LEN},
    },
    "80b": {
        "preset": "80b",
        "dtype": "bfloat16",
        "overrides": {"num_hidden_layers": 4, "num_experts": 32, "vocab_size": 1024},
    },
}


@dataclass(frozen=True)
class Start:
    """``arguments`` of ``vllm.LLM`` or ``sglang.Engine`` beside those of ``config``, ``env`` of its process."""

    config: EngineConfig
    checkpoint: str
    scenarios: tuple[str, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    quick: bool = False
    engine: str = "vllm"
    kernels: tuple[str, ...] = ()


def _start(
    name: str,
    *scenarios: str,
    v2: bool,
    checkpoint: str,
    quick: bool = False,
    kernels: tuple[str, ...] = (),
    **more: Any,
) -> Any:
    config = EngineConfig(**{k: more.pop(k) for k in list(more) if k in EngineConfig.__dataclass_fields__})
    arguments = {"additional_config": {"gdn_prefill_backend": "triton"}} | more
    if config.compiled:
        graphs = arguments.pop("graphs", FULL)
        arguments["compilation_config"] = graphs | SIZES
    env = {"VLLM_USE_V2_MODEL_RUNNER": str(int(v2))}
    if config.dtype == "float32":
        env["TRITON_F32_DEFAULT"] = "ieee"  # Triton's own attention and experts would round to TF32
    return name, Start(config, checkpoint, scenarios, arguments, env, quick, "vllm", kernels)


REAL = {"checkpoint": "80b", "dtype": "bfloat16"}
TINY = {"checkpoint": "tiny", "dtype": "float32"}
FUSED = ("verify: triton, cuda fused with the norm",)
STARTS: dict[str, Start] = dict(
    [
        _start("bf16 v1 full graphs mtp 2", "mixed", "reuse", v2=False, quick=True, kernels=FUSED,
               compiled=True, draft_tokens=2, **REAL),
        _start("bf16 v2 async full graphs mtp 1", "mixed", "reuse", v2=True, quick=True, kernels=FUSED,
               compiled=True, draft_tokens=1, async_scheduling=True, **REAL),
        _start("f32 v1 eager mtp 2 prefix caching", "mixed", "prefix_aba", "multi_turn", v2=False, quick=True,
               draft_tokens=2, num_blocks=200, prefix_caching=True, **TINY),
        _start("bf16 v1 eager", "mixed", v2=False, **REAL),
        _start("f32 v2 full graphs mtp 3", "mixed", "reuse", v2=True, compiled=True, draft_tokens=3, **TINY),
        _start("bf16 v2 full graphs, chunked", "mixed", "reuse", v2=True, compiled=True, token_budget=256,
               async_scheduling=True, **REAL),
        _start("f32 v2 prefix caching, chunked", "mixed", "prefix_aba", v2=True, token_budget=64, num_blocks=160,
               prefix_caching=True, **TINY),
        _start("bf16 v1 piecewise graphs", "mixed", "reuse", v2=False, compiled=True, graphs=PIECEWISE,
               async_scheduling=True, **REAL),
        _start("bf16 v1 mtp 3, bf16 state", "mixed", v2=False, draft_tokens=3, kernels=FUSED,
               mamba_ssm_cache_dtype="bfloat16", **REAL),
        _start("bf16 v1 FlashInfer prefill", "mixed", v2=False,
               additional_config={"gdn_prefill_backend": "auto"}, **REAL),
        ("sglang bf16", Start(EngineConfig(dtype="bfloat16"), "80b", ("mixed", "reuse"), engine="sglang", quick=True)),
    ]
)  # fmt: skip

_LENGTHS = tuple(tokens(length, seed=length) for length in (1, 7, 40, 130, 300, 700))
_BY_NAME = {
    "mixed": Scenario((_LENGTHS,)),
    "reuse": SCENARIOS["slot_reuse"],
    "prefix_aba": SCENARIOS["prefix_aba"],
    "multi_turn": SCENARIOS["multi_turn"],
}


def checkpoint(name: str) -> Path:
    """Written by the first process that needs it."""
    import torch
    from safetensors.torch import load_file, save_file

    from qnext_plugin.checkpoint.make_random import write_random_checkpoint

    folder = Path(os.environ.get("QNEXT_GPU_CHECK", "/tmp/qnext-gpu-check"))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"checkpoint-{name}"
    with (folder / f"checkpoint-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (target / "complete").exists():
            return target
        write_random_checkpoint(target, **CHECKPOINTS[name])
        for shard in target.glob("*.safetensors"):
            weights = load_file(shard)
            if "mtp.fc.weight" in weights:
                fc = weights["mtp.fc.weight"]
                fc.copy_(torch.cat([torch.eye(len(fc)), torch.zeros(len(fc), len(fc))], dim=1))
                save_file(weights, shard, {"format": "pt"})
        (target / "complete").touch()
    return target


def serving_modules(worker: Any) -> set[str]:
    """Modules of the model's and the draft's classes, in either of vLLM's model runners."""
    runner = worker.model_runner
    models = [
        runner.model,
        *(getattr(getattr(runner, name, None), "model", None) for name in ("drafter", "speculator")),
    ]
    return {type(model).__module__ for model in models if model is not None}


def runner_class(worker: Any) -> str:
    return type(worker.model_runner).__module__


def check(start: Start, report: Report, name: str) -> None:
    from qnext_plugin.verify.comparison import check_conditions, compare, rounding
    from qnext_plugin.verify.tolerances import LOGPROB_BFLOAT16_RATIO, SERVED_LOGPROB_FLOAT32

    state: dict[str, Any] = {}
    config = start.config

    def begin() -> dict[str, Any]:
        state["directory"] = checkpoint(start.checkpoint)
        arguments = dict(start.arguments)
        if start.engine == "vllm":  # a share of the GPU's memory, so that several fit
            arguments |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 3 << 30}
        worker = pkgutil.resolve_name(f"{start.engine}_ext.tools.engine")
        began = time.monotonic()
        engine = state["engine"] = worker.Engine(str(state["directory"]), config, **arguments)
        seconds = time.monotonic() - began
        if start.engine != "vllm":
            return {"start_seconds": seconds}
        modules = set().union(*engine.llm.collective_rpc(serving_modules))
        expected = {"vllm_ext.model", "vllm_ext.mtp"} if config.draft_tokens else {"vllm_ext.model"}
        assert modules == expected, f"{sorted(modules)} serve, expected {sorted(expected)}"
        runner = engine.llm.collective_rpc(runner_class)[0]
        v2 = start.env.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
        assert runner.startswith("vllm.v1.worker.gpu.") == v2 or runner.endswith("cpu_model_runner"), runner
        found = engine.llm.llm_engine.vllm_config
        return {
            "start_seconds": seconds,
            "classes": " ".join(sorted(modules)),
            "runner": runner,
            "graphs": str(found.compilation_config.cudagraph_mode),
            "async": bool(found.scheduler_config.async_scheduling),
            "block_size": engine.block_size,
        }

    def answer(key: str) -> dict[str, Any]:
        scenario = _BY_NAME[key]
        if "engine" not in state:
            raise RuntimeError("the engine did not start")
        if config.draft_tokens:  # the draft's own guesses: some right, some wrong
            scenario = Scenario(**(vars(scenario) | {"drafts": "own"}))
        result = state["engine"].run(scenario, reset=True)
        check_conditions(scenario, config, result)
        exact = _reference(state, "float32")
        tolerance = SERVED_LOGPROB_FLOAT32[start.engine]
        found = compare(result, exact, tolerance if config.dtype == "float32" else float("inf"))
        record: dict[str, Any] = {"difference": found.max, "where": found.worst, "wrong": len(found.wrong_tokens)}
        if config.draft_tokens:
            record["accepted"] = [round(a / max(result.num_drafts, 1), 3) for a in result.num_accepted]
            record["acceptance"] = record["accepted"][0]
            state.setdefault("rates", []).append(record["acceptance"])
        if config.dtype == "float32":
            assert found.max <= tolerance, f"{found.max:.3g} > {tolerance:.3g} at {found.worst}; {record}"
            assert not found.wrong_tokens, found.wrong_tokens[:5]
            return record
        theirs = rounding(result, exact, _reference(state, "bfloat16")).max
        record |= {"transformers_bf16": theirs, "ratio": found.max / theirs}
        assert record["ratio"] <= LOGPROB_BFLOAT16_RATIO, f"ratio above {LOGPROB_BFLOAT16_RATIO}: {record}"
        return record

    def kernels() -> dict[str, Any]:
        ran = sorted(set().union(*state["engine"].llm.collective_rpc(_kernels_ran)))
        missing = [kernel for kernel in start.kernels if kernel not in ran]
        assert not missing, f"{ran} ran, expected {missing}"
        assert ran, "no kernel of ours ran"
        return {"kernels": "; ".join(ran)}

    def acceptance() -> dict[str, Any]:
        rates = state.get("rates", [])
        assert any(0.05 < rate < 0.95 for rate in rates), f"drafts were all accepted or all rejected: {rates}"
        return {"rates": rates}

    report.run(f"{name}: start", begin)
    for key in start.scenarios:
        report.run(f"{name}: {key}", lambda key=key: answer(key))
    if start.engine == "vllm":
        report.run(f"{name}: kernels", kernels)
    if config.draft_tokens:
        report.run(f"{name}: drafts accepted and rejected", acceptance)


def _kernels_ran(worker: Any) -> set[str]:
    from qnext_plugin.kernel_log import KERNELS_RAN

    return KERNELS_RAN


def _reference(state: dict[str, Any], dtype: str) -> Any:
    """``transformers`` on this device."""
    import torch

    from qnext_plugin.verify.reference import Whole

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if dtype not in state:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        state[dtype] = Whole(state["directory"], getattr(torch, dtype), device)
    return state[dtype]


def left_out() -> Iterator[tuple[str, str]]:
    yield "quantized weights", "only unquantized checkpoints are checked"
    yield "several GPUs", "tensor, expert, pipeline and data parallelism want more than one"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", choices=STARTS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--deadline", type=float, default=time.time() + 600)
    args = parser.parse_args()
    start = STARTS[args.start]
    os.environ |= start.env
    report = Report("engines", args.out, args.deadline)
    check(start, report, args.start)
    # Engines leave threads and processes that would keep this one from ending.
    os._exit(int(report.failed))


if __name__ == "__main__":
    main()
