"""Samples of one SGLang engine, and answers under what a request may ask for."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from sglang_ext.tools.engine import Engine
from tests.workers import common
from tests.workers.common import Options, greedy, own_word

# SGLang applies penalties to the tokens of earlier steps only, so that with drafts they are not the same.
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}


def sample(
    engine: Engine,
    prompt: list[int],
    samples: int,
    tokens: int,
    mutants: list[str],
    regex: str,
    formats: list[Options],
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
        out["structured"] = {"xgrammar": structured(engine, formats)}
        with engine.broken(f"{__name__}:llguidance"):
            out["structured"]["llguidance"] = structured(engine, formats)
    out["greedy"] = greedy(engine, partial(ask, engine), {"ignore_eos": True}, partial(options, engine))
    return out


def ask(engine: Engine, prompts: Sequence[Sequence[int]], asked: Sequence[Options]) -> list[tuple[list[int], str]]:
    params = [{"temperature": 0, "max_new_tokens": 24, **some} for some in asked]
    outputs = engine.engine.generate(input_ids=[list(prompt) for prompt in prompts], sampling_params=params)
    return [(list(output["output_ids"]), output["text"]) for output in outputs]


def options(engine: Engine, likely: list[int]) -> dict[str, Options]:
    """Return what a request may ask for so that its answer is not ``likely``, the one without.

    Not penalties and a minimum of tokens: of the tokens that a step with drafts accepts, SGLang counts one.
    """
    word = own_word(engine.engine.tokenizer_manager.tokenizer, likely[2:])
    return {
        "stop token": {"stop_token_ids": [likely[5]]},
        "stop": {"stop": [word]},
        "bias": {"logit_bias": {str(likely[3]): -100.0}},
    }


def structured(engine: Engine, formats: Sequence[Options]) -> dict[str, Any]:
    """Return what ``common.structured`` does; a format is ``json``, a schema, or ``regex``."""
    asked = [
        {"regex": some["regex"]} if "regex" in some else {"json_schema": json.dumps(some["json"])} for some in formats
    ]
    return common.structured(engine, partial(ask, engine), [{"max_new_tokens": 200, **some} for some in asked])


@contextmanager
def llguidance(tp_worker: Any) -> Iterator[None]:
    """As if the engine had been started with ``--grammar-backend llguidance``, whose one kernel is not compiled."""
    import torch
    from sglang.srt.constrained.llguidance_backend import GuidanceBackend
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend

    config = tp_worker.model_runner.model_config
    backend = GuidanceBackend(
        tp_worker.tokenizer, any_whitespace=False, n_vocab=config.vocab_size, eos_token_ids=config.hf_eos_token_id
    )
    dispatch = {name: getattr(backend, name) for name in ("dispatch_json", "dispatch_regex")}
    with patch.multiple(XGrammarGrammarBackend, **dispatch), torch.compiler.set_stance("force_eager"):
        yield
