"""Measure one SGLang engine: ``python -m sglang_ext.tools.bench SPEC.json OUT``; see ``qnext_plugin.bench.worker``."""

import time
from collections.abc import Sequence

from qnext_plugin.bench.worker import Answered, main
from qnext_plugin.verify.scenarios import EngineConfig
from sglang_ext.tools import verify


class Engine(verify.Engine):
    def __init__(self, model: str, config: EngineConfig) -> None:
        given = verify.given(config.flags)
        pools = {name: given.get(name) for name in ("max_mamba_cache_size", "max_total_tokens")}
        super().__init__(model, config, **pools)  # None: as many as SGLang chooses

    def answer(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Answered:
        sampling = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        requests = [list(prompt) for prompt in prompts]
        begin = time.perf_counter()
        outputs = self.engine.generate(input_ids=requests, sampling_params=sampling)
        seconds = time.perf_counter() - begin
        steps = sum(output["meta_info"].get("spec_verify_ct", 0) for output in outputs)
        return Answered(seconds, [list(output["output_ids"]) for output in outputs], steps)


if __name__ == "__main__":
    main(Engine)
