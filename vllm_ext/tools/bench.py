"""Measure one vLLM engine: ``python -m vllm_ext.tools.bench SPEC.json OUT``; see ``qnext_plugin.bench.worker``."""

import time
from collections.abc import Sequence

from qnext_plugin.bench.worker import Answered, main
from vllm_ext.tools import verify


class Engine(verify.Engine):
    @property
    def ranks(self) -> int:
        return self.llm.llm_engine.vllm_config.parallel_config.world_size

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


if __name__ == "__main__":
    main(Engine)
