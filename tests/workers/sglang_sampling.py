"""Samples of one SGLang engine."""

from typing import Any

from sglang_ext.tools.engine import Engine

# SGLang applies penalties to the tokens of earlier steps only, so that with drafts they are not the same.
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}


def sample(
    engine: Engine, prompt: list[int], samples: int, tokens: int, mutants: list[str], regex: str
) -> dict[str, Any]:
    """As ``vllm_sampling``; with drafts there is a ``grammar`` too: the ``answers`` to ``regex``, greedy, two with the
    model's own drafts and two with right ones, and the share of steps that ``accepted`` all of those."""
    drafts = engine.config.draft_tokens

    def generate(samples: int, **sampling: Any) -> list[dict[str, Any]]:
        params = {"max_new_tokens": tokens, "ignore_eos": True, **sampling}
        return list(engine.engine.generate(input_ids=[prompt] * samples, sampling_params=params))

    def draw(samples: int, **sampling: Any) -> list[list[int]]:
        return [output["output_ids"] for output in generate(samples, **sampling)]

    def accepted(before: dict[str, Any], count: int) -> float:
        after = engine.counts()
        accepted = after["num_accepted"][count - 1] - before["num_accepted"][count - 1]
        return float(accepted / (after["num_drafts"] - before["num_drafts"]))

    (likely,) = draw(1, temperature=0)
    engine.drafts_as("right", [prompt + likely])
    before = engine.counts()
    out: dict[str, Any] = {"": draw(samples, **SAMPLING)}
    if drafts:
        out["accepted"] = accepted(before, 1)
    for name in mutants:
        with engine.broken(name):
            out[name] = draw(samples, **SAMPLING)
    if drafts:
        engine.drafts_as("own", [])
        grammar = {"regex": regex, "max_new_tokens": 24, "temperature": 0}
        own = generate(2, **grammar)
        engine.drafts_as("right", [prompt + own[0]["output_ids"]])
        before = engine.counts()
        answers = [output["text"] for output in own + generate(2, **grammar)]
        out["grammar"] = {"answers": answers, "accepted": accepted(before, drafts)}
    return out
