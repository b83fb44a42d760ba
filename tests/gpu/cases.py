"""The engines' starts on a GPU."""

import json
from dataclasses import dataclass, field
from typing import Any

from qnext_plugin.engines.config import EngineConfig
from tests.gpu import sglang_cases


@dataclass(frozen=True)
class Case:
    """One engine start; ``v2``: vLLM's second model runner; ``kernels`` that have to run."""

    checkpoint: str
    config: EngineConfig
    scenarios: tuple[str, ...]
    v2: bool = False
    quick: bool = False
    kernels: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


def vllm(
    name: str,
    *scenarios: str,
    checkpoint: str,
    v2: bool,
    backend: str = "triton",
    graphs: str = "FULL_AND_PIECEWISE",
    flags: tuple[str, ...] = (),
    quick: bool = False,
    kernels: tuple[str, ...] = (),
    **config: Any,
) -> tuple[str, Case]:
    # A share of the GPU's memory, so that several fit.
    flags += ("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(3 << 30))
    flags += ("--additional-config", json.dumps({"gdn_prefill_backend": backend}))
    if config.get("compiled"):
        compilation = {"cudagraph_mode": graphs, "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}
        flags += ("--compilation-config", json.dumps(compilation))
    env = {"VLLM_USE_V2_MODEL_RUNNER": str(int(v2))}
    if config["dtype"] == "float32":
        env["TRITON_F32_DEFAULT"] = "ieee"  # Triton's own attention and experts would round to TF32
    return name, Case(checkpoint, EngineConfig(flags=flags, **config), scenarios, v2, quick, kernels, env)


REAL = {"checkpoint": "80b", "dtype": "bfloat16"}
TINY = {"checkpoint": "tiny", "dtype": "float32"}
ASYNC = ("--async-scheduling",)
FUSED = ("verify: triton, cuda fused with the norm",)
CASES: dict[str, dict[str, Case]] = {
    "vllm": dict(
        [
            vllm("defaults mtp 2", "mixed", "prefix_aba", v2=True, quick=True, kernels=FUSED, backend="auto",
                 compiled=True, draft_tokens=2, prefix_caching=True, flags=ASYNC, **REAL),
            vllm("defaults, float32 states", "mixed", "prefix_aba", "multi_turn", v2=True, backend="auto",
                 compiled=True, prefix_caching=True, flags=(*ASYNC, "--mamba-ssm-cache-dtype", "float32"), **REAL),
            vllm("bf16 v1 full graphs mtp 2", "mixed", "reuse", v2=False, quick=True, kernels=FUSED,
                 compiled=True, draft_tokens=2, **REAL),
            vllm("bf16 v2 async full graphs mtp 1", "mixed", "reuse", v2=True, quick=True, kernels=FUSED,
                 compiled=True, draft_tokens=1, flags=ASYNC, **REAL),
            vllm("f32 v1 eager mtp 2 prefix caching", "mixed", "prefix_aba", "multi_turn", v2=False, quick=True,
                 draft_tokens=2, num_blocks=200, prefix_caching=True, **TINY),
            vllm("bf16 v1 eager", "mixed", v2=False, **REAL),
            vllm("f32 v2 full graphs mtp 3", "mixed", "reuse", v2=True, compiled=True, draft_tokens=3, **TINY),
            vllm("bf16 v2 full graphs, chunked", "mixed", "reuse", v2=True, compiled=True, token_budget=256,
                 flags=ASYNC, **REAL),
            vllm("f32 v2 prefix caching, chunked", "mixed", "prefix_aba", v2=True, token_budget=64, num_blocks=160,
                 prefix_caching=True, **TINY),
            vllm("bf16 v1 piecewise graphs", "mixed", "reuse", v2=False, compiled=True, graphs="PIECEWISE",
                 flags=ASYNC, **REAL),
            vllm("bf16 v1 mtp 3", "mixed", v2=False, draft_tokens=3, kernels=FUSED, **REAL),
            vllm("bf16 v1 FlashInfer prefill", "mixed", v2=False, backend="auto", **REAL),
        ]
    ),
    "sglang": {name: Case(**case) for name, case in sglang_cases.CASES.items()},
}  # fmt: skip
