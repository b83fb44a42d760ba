"""An SGLang engine for scenarios and measurements; the process of ``qnext_plugin.engines.worker`` holds it."""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qnext_plugin.bench.worker import Answered
from qnext_plugin.engines.config import EngineConfig, mtp_arguments
from qnext_plugin.verify.comparison import Completion, Result
from qnext_plugin.verify.scenarios import SAMPLING, Prompt, Scenario
from qnext_plugin.verify.worker import Worker, num_logprobs, top
from sglang_ext.tools.inside import run_scheduler

BLOCK_SIZE = 64  # tokens between the states that SGLang can keep of a prefill


def engine_args(model: str, config: EngineConfig, **more: Any) -> dict[str, Any]:
    """Return the keyword arguments of ``sglang.Engine``, including ``more``; the flags of ``config`` win."""
    args: dict[str, Any] = {
        "model_path": model,
        "dtype": config.dtype,
        "context_length": config.max_model_len,
        "disable_radix_cache": not config.prefix_caching,
        "chunked_prefill_size": config.token_budget or 2048,
        "max_running_requests": 8,
        "max_mamba_cache_size": 64,
        "max_total_tokens": config.num_tokens or 16384,
        "tp_size": config.tensor_parallel,
        "pp_size": config.pipeline_parallel,
        "disable_overlap_schedule": config.snapshots == "no_buffer" or config.pipeline_parallel > 1,
        "disable_cuda_graph": not config.compiled,
        "skip_tokenizer_init": True,
        "log_level": "info",
    }
    if config.prefix_caching:
        args["mamba_radix_cache_strategy"] = config.snapshots
    drafts = mtp_arguments("sglang", config.draft_tokens, config.tree)
    # SGLang keeps room for a step's drafts after the last position that a request may ask for.
    args["context_length"] += drafts.get("speculative_num_draft_tokens", 0)
    return args | drafts | more | given(config.flags)


def given(flags: Sequence[str]) -> dict[str, Any]:
    """Return what SGLang's own command-line flags set, as keyword arguments without defaults."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return vars(parser.parse_args(list(flags)))


def distributions(rows: list[list[tuple[float, int, Any]]], k: int) -> list[tuple[list[int], list[float]]]:
    """Return the ``k`` most likely ids and their logprobs for each row of (log-probability, token id, text)."""
    return [top({token: logprob for logprob, token, _ in row}, k) for row in rows]


def start(model: str, config: dict[str, Any], arguments: dict[str, Any]) -> "Engine":
    """Return the engine of a process that others call; ``config`` holds the fields of an ``EngineConfig``."""
    return Engine(model, EngineConfig(**config), **arguments)


class Engine(Worker):
    block_size = BLOCK_SIZE
    seeded = False  # only in SGLang's deterministic mode, which has its own kernels

    def __init__(self, model: str, config: EngineConfig, **more: Any) -> None:
        """Start the engine; ``more`` are further keyword arguments of ``sglang.Engine``."""
        from sglang.srt.entrypoints.engine import Engine as SGLangEngine

        class Controlled(SGLangEngine):
            # SGLang admits to a small cache only what it can finish there, so we make it take requests back.
            run_scheduler_process_func = staticmethod(partial(run_scheduler, 20 if config.num_tokens else 0))

        self.config = config
        self.scratch = Path(tempfile.mkdtemp())
        os.environ["SGLANG_RETURN_ORIGINAL_LOGPROB"] = "1"  # those before temperature is applied
        self.controls = 0
        if config.draft_tokens:
            os.environ["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
            os.environ["SGLANG_ENABLE_PP_SPEC"] = str(int(config.pipeline_parallel > 1))
        if config.stages:
            os.environ["SGLANG_PP_LAYER_PARTITION"] = ",".join(map(str, config.stages))
        if config.overlap:
            from sglang.srt.arg_groups import speculative_hook

            speculative_hook._disable_overlap_schedule_for_cpu = lambda server_args: None
        args = engine_args(model, config, **more)
        self.engine = Controlled(**args)
        self.ranks = args["tp_size"] * args["pp_size"]
        self.num_logprobs = num_logprobs(json.loads((Path(model) / "config.json").read_text())["vocab_size"])

    def control(self, **change: Any) -> list[dict[str, Any]]:
        """Tell every scheduler process what to change from now on; return the answer of each (see ``inside``)."""
        self.controls += 1
        directory, deadline = self.scratch / str(self.controls), time.monotonic() + 60
        self.engine.collective_rpc("qnext_control", directory=str(directory), change=json.dumps(change))
        while len(files := list(directory.glob("*.json"))) < self.ranks:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(files)} of {self.ranks} scheduler processes answered within 60 s")
            time.sleep(0.05)
        return [json.loads(file.read_text()) for file in files]

    def serving(self) -> dict[str, Any]:
        said = self.control()
        names = {name: sorted({x for one in said for x in one[name]}) for name in ("modules", "kernels")}
        return names | {"memory": said[0]["memory"], "compiled": max(one["compiled"] for one in said)}

    def reset(self) -> None:
        # The scheduler still holds a request for a moment after it has sent the answer.
        flush = self.engine.tokenizer_manager.flush_cache(timeout_s=10)
        if not (flushed := self.engine.loop.run_until_complete(flush)).success:
            raise RuntimeError(f"SGLang did not empty its prefix cache: {flushed.message}")

    @contextmanager
    def broken(self, mutant: str) -> Iterator[None]:
        self.reset()
        self.control(mutant=mutant)
        yield
        self.control(mutant="")
        self.reset()

    def counts(self) -> dict[str, Any]:
        said = self.control(count=True)
        accepted = max((one["accepted"] for one in said), key=len)
        return {
            "num_preemptions": max(one["retractions"] for one in said),
            "num_drafts": len(accepted),
            "num_accepted": [sum(n > i for n in accepted) for i in range(self.config.draft_tokens)],
        }

    def drafts_as(self, pattern: str, sequences: list[list[int]]) -> None:
        self.control(drafts={"pattern": pattern, "sequences": sequences})

    def answers(self, scenario: Scenario) -> Result:
        if not scenario.draft_logits:
            return super().answers(scenario)
        self.control(record=True)
        result = super().answers(scenario)
        steps = max((one["draft_steps"] for one in self.control(record=False)), key=len)
        # The draft continues after a request's last token, where there is nothing to compare it with.
        length = len(result.batches[0][0].query.ids)
        return replace(result, draft_steps=[step for step in steps if step["position"] + 1 < length])

    def generate(self, batch: Sequence[Prompt], scenario: Scenario) -> list[Completion]:
        sampling = SAMPLING if scenario.sampled else {"temperature": 0}
        max_tokens = [scenario.max_tokens[i % len(scenario.max_tokens)] for i in range(len(batch))]
        outputs = self.engine.generate(
            input_ids=[list(prompt) for prompt in batch],
            sampling_params=[sampling | {"max_new_tokens": n, "ignore_eos": True} for n in max_tokens],
            return_logprob=True,
            top_logprobs_num=self.num_logprobs,
            logprob_start_len=0 if scenario.prompt_logprobs else -1,
        )
        return [self._completion(p, o, scenario.prompt_logprobs) for p, o in zip(batch, outputs, strict=True)]

    def _completion(self, prompt: Prompt, output: dict[str, Any], prompt_logprobs: bool) -> Completion:
        meta = output["meta_info"]
        rows = distributions(meta["output_top_logprobs"], self.num_logprobs)
        if prompt_logprobs:
            rows = distributions(meta["input_top_logprobs"][1:], self.num_logprobs) + rows
        ids, logprobs = (torch.tensor(column) for column in zip(*rows, strict=True))
        return Completion(tuple(prompt), tuple(output["output_ids"]), ids, logprobs, meta["cached_tokens"])

    def abort(self, batch: Sequence[Prompt]) -> None:
        names = [f"aborted-{i}" for i in range(len(batch))]
        stream = self.engine.generate(
            input_ids=[list(prompt) for prompt in batch],
            sampling_params={"max_new_tokens": 100, "ignore_eos": True},
            stream=True,
            rid=names,
        )
        next(stream)
        for name in names:
            self.engine.tokenizer_manager.abort_request(name)
        finish = {chunk["index"]: chunk["meta_info"]["finish_reason"] for chunk in stream}
        if any(reason["type"] != "abort" for reason in finish.values()):
            raise RuntimeError(f"SGLang did not abort every request: {finish}")

    def answer(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Answered:
        sampling = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        requests = [list(prompt) for prompt in prompts]
        self.reset()  # NGRAM also drafts from earlier answers, and the same prompts are asked several times
        begin = time.perf_counter()
        outputs = self.engine.generate(input_ids=requests, sampling_params=sampling)
        seconds = time.perf_counter() - begin
        steps = sum(output["meta_info"].get("spec_verify_ct", 0) for output in outputs)
        return Answered(seconds, [list(output["output_ids"]) for output in outputs], steps)
