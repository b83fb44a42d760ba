"""Samples of one vLLM engine."""

import pkgutil
from typing import Any

from vllm_ext.tools.engine import Engine

SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "presence_penalty": 1.0}


def sample(
    engine: Engine, prompt: list[int], samples: int, tokens: int, mutants: list[str], regex: str
) -> dict[str, Any]:
    """Under ``""`` and each mutant, a ``module:function``, token ids ``[samples, tokens]``. With drafts also the share
    of first ones that were ``accepted``; ``regex`` is for the other engine."""
    from vllm import SamplingParams

    def draw(samples: int, **sampling: float) -> list[list[int]]:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, **sampling)
        outputs = engine.llm.generate([{"prompt_token_ids": prompt}] * samples, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    (likely,) = draw(1, temperature=0)
    drafts = engine.config.draft_tokens
    if drafts:
        engine.drafts_as("right", [prompt + likely])
    before = engine.counts()
    out: dict[str, Any] = {"": draw(samples, **SAMPLING)}
    if drafts:
        after = engine.counts()
        steps = after["num_drafts"] - before["num_drafts"]
        out["accepted"] = (after["num_accepted"][0] - before["num_accepted"][0]) / steps
    for name in mutants:
        with pkgutil.resolve_name(name)(engine.worker):
            out[name] = draw(samples, **SAMPLING)
    return out
