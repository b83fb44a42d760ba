"""vLLM's own engine, worker and graph capture on a GPU that is not there; run in a process of its own.

python -m tests.gpu.dry.vllm_start OUT.json [--native] [--drafts N] [--capability 90] [--tp N] [--v1] [--args JSON]
    [--model DIR]
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.gpu.dry.start import record, serve_without_weights, stored

# Prompts that arrive at a step, in tokens; each begins with the same tokens. They make batches of prompts, of decodes
# beside a prompt, of a prompt in pieces, of a prefix from the cache beside one that is not in it, and of one token.
BUDGET = 1024
SCRIPT = {0: [5, 70], 4: [1000], 14: [2500, 40], 22: [1]}
STEPS = 40
PROMPTS = (500, 1000, 2000, 4000)


def first_chunks(scheduler: Any) -> dict[int, int]:
    """Return how much of a new prompt of each length the scheduler computes in one step, if its budget allows all."""
    found = {}
    for n in PROMPTS:
        request = SimpleNamespace(num_computed_tokens=0, num_prompt_tokens=n, num_tokens=n, shared_prefix_boundary=0)
        found[n] = scheduler._mamba_block_aligned_split(request, n)
    return found


def serve(model: Path, drafts: int, tp: int, more: dict[str, Any]) -> dict[str, Any]:
    """Start the engine, run ``SCRIPT``, and return what served."""
    from vllm import LLM, SamplingParams

    engine: dict[str, Any] = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_num_seqs": 8,
        "max_num_batched_tokens": BUDGET,
        "max_model_len": 4096,
        "gpu_memory_utilization": 0.5,
        "dtype": "bfloat16",
        "num_gpu_blocks_override": 200,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [4, 8]},
    }
    if tp > 1:
        engine |= {"tensor_parallel_size": tp, "distributed_executor_backend": "external_launcher"}
        engine["disable_custom_all_reduce"] = True  # it would ask which GPUs reach each other
    if drafts:
        engine["speculative_config"] = {"method": "mtp", "num_speculative_tokens": drafts}
    core = LLM(**(engine | more)).llm_engine
    runner = core.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    greedy, sampled = (
        SamplingParams(max_tokens=8, ignore_eos=True, temperature=t, top_p=0.9, top_k=20, detokenize=False)
        for t in (0.0, 1.0)
    )
    for step in range(STEPS):
        for i, n in enumerate(SCRIPT.get(step, [])):
            core.add_request(f"{step}-{i}", {"prompt_token_ids": list(range(1, n + 1))}, (greedy, sampled)[i % 2])
        if core.has_unfinished_requests():
            core.step()
    return {
        "model": type(runner.get_model()).__module__,
        "runner": type(runner).__module__,
        "block_size": core.vllm_config.cache_config.block_size,
        "first_chunks": first_chunks(core.engine_core.engine_core.scheduler),
        "unfinished": core.get_num_unfinished_requests(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="80b")
    parser.add_argument("--overrides", type=json.loads, default={"num_hidden_layers": 4})
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--native", action="store_true", help="vLLM's own model")
    parser.add_argument("--drafts", type=int, default=0)
    parser.add_argument("--tp", type=int, default=1, help="ranks, of which this process is the first")
    parser.add_argument("--v1", action="store_true", help="the older model runner")
    parser.add_argument("--model", type=Path, help="a checkpoint whose weights are loaded; otherwise there are none")
    parser.add_argument("--args", type=json.loads, default={}, help="arguments of the engine")
    parser.add_argument("--all-configs", action="store_true", help="compile every configuration of autotuned kernels")
    parser.add_argument("--mutant", help="a function of vllm_mutants.py that breaks something")
    options = parser.parse_args()
    if options.native:
        os.environ["QNEXT_DISABLE"] = "1"
    if options.v1:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DISABLE_COMPILE_CACHE": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
        "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
        "VLLM_DEEP_GEMM_WARMUP": "skip",
        "HF_HUB_OFFLINE": "1",
    }
    from tests.gpu.dry import install, jit, vllm_ops, vllm_patches

    mode = install.install(options.capability, vllm_ops.FAKES, all_configs=options.all_configs)
    jit.patch_flashinfer()
    jit.patch_cute(options.capability)

    with mode:
        vllm_patches.apply(options.tp)
        if options.mutant:
            from tests.gpu.dry import vllm_mutants

            getattr(vllm_mutants, options.mutant)()

        def serve_model(model: Path) -> dict[str, Any]:
            return serve(model, options.drafts, options.tp, options.args)

        def serve_stored() -> dict[str, Any]:
            served = serve(options.model, options.drafts, options.tp, {"load_format": "auto"} | options.args)
            return served | stored("_k_scale", "_v_scale")

        if options.model:
            record(options.out, serve_stored)
        record(options.out, partial(serve_without_weights, options.preset, options.overrides, serve_model))


if __name__ == "__main__":
    main()
