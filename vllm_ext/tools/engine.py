"""A vLLM engine for scenarios and measurements; the process of ``qnext_plugin.engines.worker`` holds it."""

import argparse
import os
import pkgutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from qnext_plugin.bench.worker import Answered
from qnext_plugin.engines.config import VLLM_BLOCK_SIZE, EngineConfig, mtp_arguments
from qnext_plugin.verify.comparison import Completion, Result
from qnext_plugin.verify.scenarios import SAMPLING, Prompt, Scenario
from qnext_plugin.verify.worker import Worker, num_logprobs, top
from vllm_ext.tools.inside import kernels_ran, record_draft, runner_module, serving_modules, set_drafts

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for the functions that we run in workers


def engine_args(model: str, config: EngineConfig, **more: Any) -> dict[str, Any]:
    """Return the keyword arguments of ``vllm.LLM``, including ``more``; the flags of ``config`` win."""
    args = {
        "model": model,
        "dtype": config.dtype,
        "enforce_eager": not config.compiled,
        "enable_prefix_caching": config.prefix_caching,
        "max_num_batched_tokens": config.token_budget or 2048,
        "num_gpu_blocks_override": config.num_blocks,
        "max_model_len": config.max_model_len,
        "max_num_seqs": 8,
        "max_logprobs": -1,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "tensor_parallel_size": config.tensor_parallel,
        "pipeline_parallel_size": config.pipeline_parallel,
        "enable_expert_parallel": config.expert_parallel,
        "distributed_executor_backend": config.executor,
    }
    if config.draft_tokens and config.pipeline_parallel > 1:
        args["scheduler_cls"] = "vllm_ext.scheduler.PipelineDraftScheduler"
    if config.prefix_caching:
        args["block_size"] = VLLM_BLOCK_SIZE
    return args | mtp_arguments("vllm", config.draft_tokens) | more | given(config.flags)


def given(flags: Sequence[str]) -> dict[str, Any]:
    """Return what vLLM's own command-line flags set, as keyword arguments without defaults."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return vars(parser.parse_args(list(flags)))


def distributions(flat: Any, k: int, start: int = 0) -> list[tuple[list[int], list[float]]]:
    """Return the ``k`` most likely ids and their logprobs at each position of a ``FlatLogprobs`` from ``start`` on."""
    spans = list(zip(flat.start_indices, flat.end_indices, strict=True))[start:]
    return [top(dict(zip(flat.token_ids[a:b], flat.logprobs[a:b], strict=True)), k) for a, b in spans]


def start(model: str, config: dict[str, Any], arguments: dict[str, Any]) -> "Engine":
    """Return the engine of a process that others call; ``config`` holds the fields of an ``EngineConfig``."""
    return Engine(model, EngineConfig(**config), **arguments)


class Engine(Worker):
    def __init__(self, model: str, config: EngineConfig, **more: Any) -> None:
        """Start the engine; ``more`` are further keyword arguments of ``vllm.LLM``."""
        from vllm import LLM

        self.config = config
        if config.stages:
            os.environ["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, config.stages))
        self.llm = LLM(**engine_args(model, config, **more))
        self.block_size = self.llm.llm_engine.vllm_config.cache_config.block_size
        self.num_logprobs = num_logprobs(self.llm.llm_engine.model_config.get_vocab_size())

    @property
    def ranks(self) -> int:
        return int(self.llm.llm_engine.vllm_config.parallel_config.world_size)

    @property
    def worker(self) -> Any:
        """Return the worker itself; this works only where it runs in this process."""
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker

    def serving(self) -> dict[str, Any]:
        modules = set().union(*self.llm.collective_rpc(serving_modules))
        kernels = set().union(*self.llm.collective_rpc(kernels_ran))
        config = self.llm.llm_engine.vllm_config
        return {
            "modules": sorted(modules),
            "kernels": sorted(kernels),
            "memory": self.memory(),
            "runner": self.llm.collective_rpc(runner_module)[0],
            "graphs": str(config.compilation_config.cudagraph_mode),
            "async": bool(config.scheduler_config.async_scheduling),
        }

    def memory(self) -> dict[str, Any]:
        cache = self.llm.llm_engine.vllm_config.cache_config
        return {
            "block_size": cache.block_size,
            "num_blocks": cache.num_gpu_blocks,
            "concurrency": cache.kv_cache_max_concurrency,
        }

    def reset(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache: requests are still running")

    @contextmanager
    def broken(self, mutant: str) -> Iterator[None]:
        self.reset()
        with pkgutil.resolve_name(mutant)(self.worker):
            yield
        self.reset()

    def counts(self) -> dict[str, Any]:
        metrics = {m.name: m for m in self.llm.get_metrics()}
        counts = {"num_preemptions": metrics["vllm:num_preemptions"].value, "num_drafts": 0, "num_accepted": []}
        if "vllm:spec_decode_num_drafts" in metrics:
            counts["num_drafts"] = metrics["vllm:spec_decode_num_drafts"].value
            counts["num_accepted"] = metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values
        return counts

    def drafts_as(self, pattern: str, sequences: list[list[int]]) -> None:
        self.llm.collective_rpc(set_drafts, args=(sequences, pattern))

    def answers(self, scenario: Scenario) -> Result:
        stop = record_draft(self.worker) if scenario.draft_logits else None
        result = super().answers(scenario)
        return replace(result, draft_steps=stop()) if stop else result

    def generate(self, batch: Sequence[Prompt], scenario: Scenario) -> list[Completion]:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                max_tokens=scenario.max_tokens[i % len(scenario.max_tokens)],
                ignore_eos=True,
                detokenize=False,
                logprobs=self.num_logprobs,
                prompt_logprobs=self.num_logprobs if scenario.prompt_logprobs else None,
                flat_logprobs=True,
                **(dict[str, Any](SAMPLING, seed=sum(prompt)) if scenario.sampled else {"temperature": 0}),
            )
            for i, prompt in enumerate(batch)
        ]
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in batch]
        return [self._completion(output) for output in self.llm.generate(prompts, params, use_tqdm=False)]

    def _completion(self, output: Any) -> Completion:
        said = output.outputs[0]
        rows = distributions(said.logprobs, self.num_logprobs)
        if output.prompt_logprobs:
            rows = distributions(output.prompt_logprobs, self.num_logprobs, start=1) + rows
        ids, logprobs = (torch.tensor(column) for column in zip(*rows, strict=True))
        prompt, token_ids = tuple(output.prompt_token_ids), tuple(said.token_ids)
        return Completion(prompt, token_ids, ids, logprobs, output.num_cached_tokens)

    def abort(self, batch: Sequence[Prompt]) -> None:
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        ids = [f"aborted-{i}" for i in range(len(batch))]
        for request, prompt in zip(ids, batch, strict=True):
            params = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True, detokenize=False)
            engine.add_request(request, {"prompt_token_ids": list(prompt)}, params)
        for _ in range(3):
            engine.step()
        engine.abort_request(ids)

    def answer(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Answered:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        steps = self.counts()["num_drafts"]
        begin = time.perf_counter()
        outputs = self.llm.generate(requests, sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        token_ids = [list(output.outputs[0].token_ids) for output in outputs]
        return Answered(seconds, token_ids, self.counts()["num_drafts"] - steps)
