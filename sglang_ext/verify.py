"""Run scenarios in one SGLang engine: ``python -m sglang_ext.verify SPEC.json OUT.json``.

``SPEC`` holds ``model`` (a checkpoint directory), ``config`` (the fields of an ``EngineConfig``), ``runs`` (each a
``key``, the fields of a ``scenario``, and a ``mutant``: empty, or the ``module:function`` that breaks the model for it)
and ``expect_module`` (start of the module name of the class that must serve). ``OUT`` is written only if all of it ran.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qnext_plugin.verify.scenarios import MAX_MODEL_LEN, EngineConfig, Scenario
from sglang_ext.verify_inside import CONTROL, run_scheduler

BLOCK_SIZE = 64  # tokens between the states that SGLang can keep of a prefill


def engine_args(model: str, config: EngineConfig) -> dict[str, Any]:
    """Keyword arguments of ``sglang.Engine``."""
    args: dict[str, Any] = {
        "model_path": model,
        "dtype": config.dtype,
        "context_length": MAX_MODEL_LEN,
        "disable_radix_cache": not config.prefix_caching,
        "chunked_prefill_size": config.token_budget or 2048,
        "max_running_requests": 8,
        "max_mamba_cache_size": 64,
        "max_total_tokens": config.num_tokens or 16384,
        "tp_size": config.tensor_parallel,
        "pp_size": config.pipeline_parallel,
        "skip_tokenizer_init": True,
        "log_level": "info",
    }
    if config.prefix_caching:
        args["mamba_radix_cache_strategy"] = config.snapshots
        args["disable_overlap_schedule"] = config.snapshots == "no_buffer"
    if config.draft_tokens:
        drafts = config.tree or config.draft_tokens + 1
        # SGLang keeps room for a step's drafts behind the last position that a request may ask for.
        args["context_length"] += drafts
        args |= {
            "speculative_algorithm": "NEXTN",
            "speculative_num_steps": config.draft_tokens,
            "speculative_eagle_topk": 2 if config.tree else 1,
            "speculative_num_draft_tokens": drafts,
        }
    return args


def distributions(rows: list[list[tuple[float, int, Any]]]) -> list[list[float]]:
    """Rows of (log-probability, token id, text) in any order, each as log-probabilities ordered by token id."""
    out = []
    for row in rows:
        by_id = {token: logprob for logprob, token, _ in row}
        assert sorted(by_id) == list(range(len(by_id))), "not the whole distribution"
        out.append([by_id[i] for i in range(len(by_id))])
    return out


class Engine:
    def __init__(self, model: str, config: EngineConfig, **more: Any) -> None:
        """``more``: further keyword arguments of ``sglang.Engine``."""
        from sglang.srt.entrypoints.engine import Engine as SGLangEngine

        class Controlled(SGLangEngine):  # type: ignore[misc]
            run_scheduler_process_func = staticmethod(run_scheduler)

        self.config = config
        self.control = Path(tempfile.mkdtemp()) / "control"
        os.environ[CONTROL] = str(self.control)
        self.flushes = 0
        if config.num_tokens:
            # SGLang admits to a small cache only what it can finish there, so it is told to take requests back.
            os.environ["SGLANG_TEST_RETRACT"] = "1"
            os.environ["SGLANG_TEST_RETRACT_INTERVAL"] = "20"
        if config.draft_tokens:
            os.environ["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
            os.environ["SGLANG_ENABLE_PP_SPEC"] = str(int(config.pipeline_parallel > 1))
        if config.overlap:
            from sglang.srt.arg_groups import speculative_hook

            speculative_hook._disable_overlap_schedule_for_cpu = lambda server_args: None
        self.engine = Controlled(**engine_args(model, config) | more)
        self.vocab_size = json.loads((Path(model) / "config.json").read_text())["vocab_size"]

    def flush(self, mutant: str = "", **drafts: Any) -> dict[str, Any]:
        """Empty the cache, apply the mutant and put in the draft's mouth what ``control_draft`` is to; returns what
        all scheduler processes say."""
        self.flushes += 1
        self.control.write_text(json.dumps({"flush": self.flushes, "mutant": mutant, "drafts": drafts}))
        assert self.engine.flush_cache().success
        ranks = self.config.tensor_parallel * self.config.pipeline_parallel
        deadline = time.monotonic() + 60
        while len(said := self._said()) < ranks:
            assert time.monotonic() < deadline, f"{len(said)} of {ranks} processes answered"
            time.sleep(0.05)
        return {
            "modules": sorted({module for one in said for module in one["modules"]}),
            "kernels": sorted({kernel for one in said for kernel in one["kernels"]}),
            "memory": said[0]["memory"],
            "compiled": max(one["compiled"] for one in said),
            "retractions": max(one["retractions"] for one in said),
            "accepted": max((one["accepted"] for one in said), key=len),
            "draft_steps": max((one["draft_steps"] for one in said), key=len),
        }

    def _said(self) -> list[dict[str, Any]]:
        files = self.control.parent.glob("said.*.json")
        return [one for one in (json.loads(file.read_text()) for file in files) if one["flush"] == self.flushes]

    def run(self, scenario: Scenario, mutant: str = "") -> dict[str, Any]:
        """Answer a scenario; with drafts to be put in the model's mouth, once without them to learn the right ones."""
        if not self.config.draft_tokens or scenario.drafts == "own":
            return self._run(scenario, mutant)
        plain = self._run(scenario, mutant)
        sequences = [[*c["prompt"], *c["token_ids"]] for batch in plain["batches"] for c in batch]
        return self._run(scenario, mutant, sequences=sequences, pattern=scenario.drafts)

    def _run(self, scenario: Scenario, mutant: str, **drafts: Any) -> dict[str, Any]:
        before = self.flush(mutant, record=scenario.draft_logits, **drafts)["retractions"]
        for prompt in scenario.aborted:
            self._abort(list(prompt))
        batches = [self._generate(batch, scenario) for batch in scenario.batches]
        said = batches[0][0]
        for turn in scenario.turns:
            batches.append(self._generate([(*said["prompt"], *said["token_ids"], *turn)], scenario))
            said = batches[-1][0]
        after = self.flush()
        # The draft goes on behind a request's last token, where there is nothing to compare it with.
        length = len(batches[0][0]["prompt"]) + len(batches[0][0]["token_ids"])
        return {
            "batches": batches,
            "num_preemptions": after["retractions"] - before,
            "block_size": BLOCK_SIZE,
            "num_drafts": len(after["accepted"]),
            "num_accepted": [sum(n > i for n in after["accepted"]) for i in range(self.config.draft_tokens)],
            "draft_steps": [step for step in after["draft_steps"] if step["position"] + 1 < length],
        }

    def _abort(self, prompt: list[int]) -> None:
        """Drop a request after its first tokens, while it is running."""
        stream = self.engine.generate(
            input_ids=prompt, sampling_params={"max_new_tokens": 500, "ignore_eos": True}, stream=True, rid="aborted"
        )
        next(stream)
        self.engine.tokenizer_manager.abort_request("aborted")
        finish = [chunk["meta_info"]["finish_reason"] for chunk in stream][-1]
        assert finish["type"] == "abort", finish

    def _generate(self, batch: Sequence[tuple[int, ...]], scenario: Scenario) -> list[dict[str, Any]]:
        outputs = self.engine.generate(
            input_ids=[list(prompt) for prompt in batch],
            sampling_params={"max_new_tokens": scenario.max_tokens, "temperature": 0, "ignore_eos": True},
            return_logprob=True,
            top_logprobs_num=self.vocab_size,
            logprob_start_len=0 if scenario.prompt_logprobs else -1,
        )
        return [self._completion(p, o, scenario.prompt_logprobs) for p, o in zip(batch, outputs, strict=True)]

    def _completion(self, prompt: tuple[int, ...], output: dict[str, Any], prompt_logprobs: bool) -> dict[str, Any]:
        meta = output["meta_info"]
        return {
            "prompt": prompt,
            "token_ids": output["output_ids"],
            "logprobs": distributions(meta["output_top_logprobs"]),
            "prompt_logprobs": distributions(meta["input_top_logprobs"][1:]) if prompt_logprobs else None,
            "num_cached_tokens": meta["cached_tokens"],
        }


def main(spec_file: str, out_file: str) -> None:
    spec = json.loads(Path(spec_file).read_text())
    begin = time.monotonic()
    engine = Engine(spec["model"], EngineConfig(**spec["config"]))
    says = engine.flush()
    modules = says["modules"]
    assert all(m.startswith(spec["expect_module"]) for m in modules), f"{modules} serve, not {spec['expect_module']}"
    out: dict[str, Any] = {"modules": modules, "memory": says["memory"], "results": {}}
    out["seconds"] = {"start": time.monotonic() - begin}
    for run in spec["runs"]:
        begin = time.monotonic()
        out["results"][run["key"]] = engine.run(Scenario(**run["scenario"]), run["mutant"])
        out["seconds"][run["key"]] = time.monotonic() - begin
    said = engine.flush()
    out |= {"kernels": said["kernels"], "compiled": said["compiled"]}
    Path(out_file).write_text(json.dumps(out))
    sys.stdout.flush()
    # Engine.shutdown can wait for ever. SGLang's processes end with this one, and the caller ends the whole group.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
