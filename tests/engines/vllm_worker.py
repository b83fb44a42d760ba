"""Run scenarios in one vLLM engine: ``python -m tests.engines.vllm_worker SPEC.json OUT.json``.

``SPEC`` holds ``model`` (a checkpoint directory), ``config`` (the fields of an ``EngineConfig``), ``scenarios`` and
``mutants`` (names) and ``expect_module`` (start of the module name of the class that must serve). ``OUT`` is written
only if everything ran.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.engines.scenarios import MAX_MODEL_LEN, SCENARIOS, EngineConfig, Scenario, prompts

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


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
    }
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
    def __init__(self, model: str, config: EngineConfig) -> None:
        from vllm import LLM

        self.llm = LLM(**engine_args(model, config))
        self.model = self.llm.apply_model(lambda model: model)[0]
        self.block_size = self.llm.llm_engine.vllm_config.cache_config.block_size

    def preemptions(self) -> int:
        return sum(m.value for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions")

    def run(self, scenario: Scenario) -> dict[str, Any]:
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
        before, batches = self.preemptions(), []
        for _ in scenario.batches:
            batch = [{"prompt_token_ids": ids} for ids in prompts(scenario, batches)]
            outputs = self.llm.generate(batch, sampling, use_tqdm=False)
            batches.append([self._completion(output) for output in outputs])
        return {
            "batches": batches,
            "num_preemptions": self.preemptions() - before,
            "block_size": self.block_size,
        }

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
    module = type(engine.model).__module__
    assert module.startswith(spec["expect_module"]), f"{module} serves, expected {spec['expect_module']}"
    out: dict[str, Any] = {"module": module, "seconds": {"start": time.monotonic() - begin}, "results": {}}

    def run(key: str, scenario: str) -> None:
        begin = time.monotonic()
        out["results"][key] = engine.run(SCENARIOS[scenario])
        out["seconds"][key] = time.monotonic() - begin

    for name in spec["scenarios"]:
        run(name, name)
    if spec["mutants"]:
        from tests.engines.mutants import mutants

        for name in spec["mutants"]:
            mutant = mutants("vllm")[name]
            with mutant.applied(engine.model):
                run(name, mutant.scenario)
    if spec["expect_module"] == "vllm_ext":
        from vllm_ext.kernels import KERNELS_RAN

        out["kernels"] = sorted(KERNELS_RAN)
    Path(out_file).write_text(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
