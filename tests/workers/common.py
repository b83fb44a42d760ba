"""What either engine answers where a request asks for more than the most likely tokens."""

from collections.abc import Callable, Sequence
from typing import Any

from qnext_plugin.verify.scenarios import tokens
from qnext_plugin.verify.worker import Worker

Options = dict[str, Any]
Ask = Callable[[Sequence[Sequence[int]], Sequence[Options]], list[tuple[list[int], str]]]
"""Answers prompts together, each with the engine's own options; returns token ids and text."""
LETTERS = 94  # ids below are printable ASCII: vLLM begins an answer's text with what a prompt leaves of a character


def answers(engine: Worker, ask: Ask, prompts: Sequence[Sequence[int]], asked: Sequence[Options]) -> dict[str, Any]:
    """Return the answers, ``own`` if there are drafts.

    With drafts also those ``drafted`` when right and wrong drafts take turns, and how many were ``accepted``, by
    position.
    """
    engine.drafts_as("own", [])
    found: dict[str, Any] = {"own": ask(prompts, asked)}
    if engine.config.draft_tokens:
        before = engine.counts()["num_accepted"]
        engine.drafts_as("cycle", [[*prompt, *ids] for prompt, (ids, _) in zip(prompts, found["own"], strict=True)])
        found["drafted"] = ask(prompts, asked)
        found["accepted"] = [b - a for a, b in zip(before, engine.counts()["num_accepted"], strict=True)]
        engine.drafts_as("own", [])
    return found


def greedy(
    engine: Worker, ask: Ask, whole: Options, options: Callable[[list[int]], dict[str, Options]]
) -> dict[str, Any]:
    """Return ``answers`` under each of the ``options`` by ``names``, each on its own prompt, and those ``without``.

    ``options`` depend on the answer without; ``whole`` is asked for there.
    """
    prompts = [list(tokens(9, seed=50 + i)) for i in range(8)]
    engine.drafts_as("own", [])
    without = ask(prompts, [whole] * len(prompts))
    each = [options(ids) for ids, _ in without]
    names = list(each[0])
    asked = [some[name] for some, name in zip(each, names, strict=False)]
    return {"names": names, "without": without[: len(names)], **answers(engine, ask, prompts[: len(names)], asked)}


def own_word(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of the first of these tokens that is a token by itself again."""
    return next(word for token in ids if tokenizer.encode(word := tokenizer.decode([token])) == [token])


def structured(engine: Worker, ask: Ask, formats: Sequence[Options]) -> dict[str, Any]:
    """Return ``answers`` in each format: the most likely one, and three that are sampled."""
    asked = [{**some, "temperature": temperature} for some in formats for temperature in (0, 1, 1, 1)]
    prompts = [list(tokens(20, 70 + i, LETTERS)) for i in range(len(asked))]
    return answers(engine, ask, prompts, asked)
