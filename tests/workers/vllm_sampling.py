"""Samples of one vLLM engine, and greedy answers under what a request may ask for."""

import pkgutil
from collections.abc import Sequence
from functools import partial
from typing import Any

from tests.workers.common import Options, greedy, own_word
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
    out["greedy"] = greedy(engine, partial(ask, engine), {"ignore_eos": True}, partial(options, engine))
    return out


def ask(engine: Engine, prompts: Sequence[Sequence[int]], asked: Sequence[Options]) -> list[tuple[list[int], str]]:
    from vllm import SamplingParams

    params = [SamplingParams(**{"temperature": 0, "max_tokens": 24, **some}) for some in asked]
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    outputs = [output.outputs[0] for output in engine.llm.generate(requests, params, use_tqdm=False)]
    return [(list(output.token_ids), output.text) for output in outputs]


def options(engine: Engine, likely: list[int]) -> dict[str, Options]:
    """Return what a request may ask for so that its answer is not ``likely``, the one without."""
    word = own_word(engine.llm.get_tokenizer(), likely[2:])
    return {
        "penalties": {"presence_penalty": 1.5, "frequency_penalty": 0.8, "repetition_penalty": 1.3},
        "stop token": {"stop_token_ids": [likely[5]]},
        "stop": {"stop": [word]},
        "minimum of tokens": {"stop_token_ids": likely[5:8], "min_tokens": 9},
        "allowed tokens": {"allowed_token_ids": [token for token in range(256) if token != likely[3]]},
        "bad words": {"bad_words": [word]},
    }
