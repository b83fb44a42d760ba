"""Samples of one vLLM engine, and answers under what a request may ask for."""

import pkgutil
from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

from tests.workers import common
from tests.workers.common import Options, greedy, own_word
from vllm_ext.tools.engine import Engine

SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "presence_penalty": 1.0}
BACKENDS = ("xgrammar", "guidance", "outlines")  # not lm-format-enforcer, which does not find vLLM 0.32's tokenizers


def sample(
    engine: Engine,
    prompt: list[int],
    samples: int,
    tokens: int,
    mutants: list[str],
    regex: str,
    formats: list[Options],
) -> dict[str, Any]:
    """Under ``""`` and each mutant, a ``module:function``, token ids ``[samples, tokens]``. With drafts also the share
    of first ones that were ``accepted``, and answers in ``formats`` by each backend; ``regex`` is for the other engine.
    """
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
    if drafts:
        out["structured"] = {name: structured(engine, name, formats) for name in BACKENDS}
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


def structured(engine: Engine, backend: str, formats: Sequence[Options]) -> dict[str, Any]:
    """Return what ``common.structured`` does, as if the engine had been started with this backend."""
    from vllm.sampling_params import StructuredOutputsParams

    llm = engine.llm.llm_engine
    manager = llm.engine_core.engine_core.structured_output_manager
    asked = [{"structured_outputs": StructuredOutputsParams(**some), "max_tokens": 200} for some in formats]
    with (
        patch.object(llm.vllm_config.structured_outputs_config, "backend", backend),
        patch.object(manager, "backend", None),  # vLLM makes it for the first request, and keeps it
    ):
        found = common.structured(engine, partial(ask, engine), asked)
        assert manager.backend is not None
        return {"class": type(manager.backend).__name__, **found}
