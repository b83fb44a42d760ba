"""Run scenarios in one vLLM engine: ``python -m vllm_ext.verify SPEC.json OUT.json``.

``SPEC`` holds ``model`` (a checkpoint directory), ``config`` (the fields of an ``EngineConfig``), ``runs`` (each a
``key``, the fields of a ``scenario``, and a ``mutant``: empty, or the ``module:function`` that breaks the model for it)
and ``expect_module`` (start of the module name of the class that must serve). ``OUT`` is written only if all of it ran.
"""

import json
import os
import pkgutil
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from qnext_plugin.verify.scenarios import MAX_MODEL_LEN, EngineConfig, Scenario
from vllm_ext.verify_inside import kernels_ran, record_draft, serving_modules, set_drafts

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for the functions we run in workers


def engine_args(model: str, config: EngineConfig) -> dict[str, Any]:
    """Keyword arguments of ``vllm.LLM``."""
    args = {
        "model": model,
        "dtype": config.dtype,
        "enforce_eager": not config.compiled,
        "enable_prefix_caching": config.prefix_caching,
        "max_num_batched_tokens": config.token_budget or 2048,
        "num_gpu_blocks_override": config.num_blocks,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 8,
        "max_logprobs": -1,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "tensor_parallel_size": config.tensor_parallel,
        "pipeline_parallel_size": config.pipeline_parallel,
        "enable_expert_parallel": config.expert_parallel,
        "distributed_executor_backend": config.executor,
    }
    if config.draft_tokens:
        args["speculative_config"] = {
            "method": "qwen3_next_mtp",
            "num_speculative_tokens": config.draft_tokens,
        }
    if config.draft_tokens and config.pipeline_parallel > 1:
        args["scheduler_cls"] = "vllm_ext.scheduler.PipelineDraftScheduler"
    if config.prefix_caching:
        args["block_size"] = 32  # rounded up by vLLM until an attention page holds a recurrent state
    return args


def distributions(flat: Any, start: int = 0) -> list[list[float]]:
    """``FlatLogprobs`` as one row per position from ``start`` on, ordered by token id."""
    rows = []
    for begin, end in list(zip(flat.start_indices, flat.end_indices, strict=True))[start:]:
        # The sampled token comes first and again at its rank.
        row = dict(zip(flat.token_ids[begin:end], flat.logprobs[begin:end], strict=True))
        assert sorted(row) == list(range(len(row))), "not the whole distribution"
        rows.append([row[i] for i in range(len(row))])
    return rows


class Engine:
    def __init__(self, model: str, config: EngineConfig, **more: Any) -> None:
        """``more``: further keyword arguments of ``vllm.LLM``."""
        from vllm import LLM

        self.config = config
        self.llm = LLM(**engine_args(model, config) | more)
        self.block_size = self.llm.llm_engine.vllm_config.cache_config.block_size

    @property
    def worker(self) -> Any:
        """The worker itself: only where it is this process."""
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker

    def memory(self) -> dict[str, Any]:
        cache = self.llm.llm_engine.vllm_config.cache_config
        return {
            "block_size": cache.block_size,
            "num_blocks": cache.num_gpu_blocks,
            "concurrency": cache.kv_cache_max_concurrency,
        }

    def counts(self) -> dict[str, Any]:
        metrics = {m.name: m for m in self.llm.get_metrics()}
        counts = {"num_preemptions": metrics["vllm:num_preemptions"].value, "num_drafts": 0, "num_accepted": []}
        if "vllm:spec_decode_num_drafts" in metrics:
            counts["num_drafts"] = metrics["vllm:spec_decode_num_drafts"].value
            counts["num_accepted"] = metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values
        return counts

    def run(self, scenario: Scenario) -> dict[str, Any]:
        """Answer a scenario; with drafts to be put in the model's mouth, once without them to learn the right ones."""
        if not self.config.draft_tokens or scenario.drafts == "own":
            return self._run(scenario)
        plain = self._run(scenario)
        sequences = [c["prompt"] + c["token_ids"] for batch in plain["batches"] for c in batch]
        self.llm.collective_rpc(set_drafts, args=(sequences, scenario.drafts))
        try:
            return self._run(scenario)
        finally:
            self.llm.collective_rpc(set_drafts, args=([], "own"))

    def _abort(self, prompts: tuple[tuple[int, ...], ...], sampling: Any) -> None:
        engine = self.llm.llm_engine
        ids = [f"aborted-{i}" for i in range(len(prompts))]
        for request, prompt in zip(ids, prompts, strict=True):
            engine.add_request(request, {"prompt_token_ids": list(prompt)}, sampling)
        for _ in range(3):
            engine.step()
        engine.abort_request(ids)

    def _run(self, scenario: Scenario) -> dict[str, Any]:
        from vllm import SamplingParams

        self.llm.reset_prefix_cache()
        sampling = SamplingParams(
            max_tokens=scenario.max_tokens,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            logprobs=-1,
            prompt_logprobs=-1 if scenario.prompt_logprobs else None,
            flat_logprobs=True,
        )
        before, batches = self.counts(), []
        if scenario.aborted:
            self._abort(scenario.aborted, sampling)
        stop = record_draft(self.worker) if scenario.draft_logits else None
        for batch in scenario.batches:
            batches.append(self._generate(batch, sampling))
        said = batches[0][0]
        for turn in scenario.turns:
            batches.append(self._generate([(*said["prompt"], *said["token_ids"], *turn)], sampling))
            said = batches[-1][0]
        after = self.counts()
        return {
            "batches": batches,
            "block_size": self.block_size,
            "draft_steps": stop() if stop else None,
            "num_preemptions": after["num_preemptions"] - before["num_preemptions"],
            "num_drafts": after["num_drafts"] - before["num_drafts"],
            "num_accepted": [b - a for a, b in zip(before["num_accepted"], after["num_accepted"], strict=True)],
        }

    def _generate(self, batch: Iterable[tuple[int, ...]], sampling: Any) -> list[dict[str, Any]]:
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in batch]
        return [self._completion(output) for output in self.llm.generate(prompts, sampling, use_tqdm=False)]

    def _completion(self, output: Any) -> dict[str, Any]:
        prompt_logprobs = output.prompt_logprobs
        return {
            "prompt": output.prompt_token_ids,
            "token_ids": list(output.outputs[0].token_ids),
            "logprobs": distributions(output.outputs[0].logprobs),
            "prompt_logprobs": distributions(prompt_logprobs, start=1) if prompt_logprobs else None,
            "num_cached_tokens": output.num_cached_tokens,
        }


def main(spec_file: str, out_file: str) -> None:
    spec = json.loads(Path(spec_file).read_text())
    begin = time.monotonic()
    engine = Engine(spec["model"], EngineConfig(**spec["config"]))
    modules = set().union(*engine.llm.collective_rpc(serving_modules))
    assert all(m.startswith(spec["expect_module"]) for m in modules), f"{modules} serve, not {spec['expect_module']}"
    out: dict[str, Any] = {"modules": sorted(modules), "memory": engine.memory(), "results": {}}
    out["seconds"] = {"start": time.monotonic() - begin}

    for run in spec["runs"]:
        begin = time.monotonic()
        with pkgutil.resolve_name(run["mutant"])(engine.worker) if run["mutant"] else nullcontext():
            out["results"][run["key"]] = engine.run(Scenario(**run["scenario"]))
        out["seconds"][run["key"]] = time.monotonic() - begin
    if spec["expect_module"] == "vllm_ext":
        out["kernels"] = sorted(set().union(*engine.llm.collective_rpc(kernels_ran)))
    Path(out_file).write_text(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
