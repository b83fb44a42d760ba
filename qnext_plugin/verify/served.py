"""Plan what a running server is asked, and ask it: ``qnext verify --url``."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qnext_plugin.config import QNextConfig
from qnext_plugin.engines.client import ServerFailed
from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.plan.caches import VllmCache, default_state_dtype
from qnext_plugin.plan.sizes import Serving
from qnext_plugin.verify.report import NOT_EXERCISED, OK, Row
from qnext_plugin.verify.runner import Run, Start, passes
from qnext_plugin.verify.scenarios import Scenario, scenarios
from qnext_plugin.verify.server import Facts, Server
from qnext_plugin.verify.starts import BLOCK, texts
from qnext_plugin.verify.verification import judge_against

_ROOM = 100  # tokens after a scenario's longest request: aborted requests ask for as many
_CHOSEN_DRAFTS = ("drafts_in_every_pattern", "drafts_all_right")
_COLD = ("prompt_logprobs", "aborts", "preemption")
"""Scenarios that show nothing when they find their prompts in the cache."""


def check_same_model(server: Server, checkpoint: Path) -> None:
    """Raise ``ValueError`` if the server says that it serves another architecture than the checkpoint's."""
    wanted, found = _config(checkpoint).get("architectures"), server.facts.architectures
    if wanted and found and not set(wanted) & set(found):
        raise ValueError(f"{server.client.url} serves {', '.join(found)}, and MODEL is {', '.join(wanted)}")


def served_dtype(asked: str | None, server: Server, checkpoint: Path) -> tuple[str, str]:
    """Return the dtype to judge by, and who says so: the user, the server, or else the checkpoint."""
    if asked or server.facts.dtype:
        return (asked, "--dtype") if asked else (str(server.facts.dtype), "the server")
    config = _config(checkpoint)
    dtype = str(config.get("dtype") or config.get("torch_dtype"))
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"neither the server nor config.json names the dtype (found {dtype}); set --dtype")
    return dtype, "config.json; the server does not say"


def plan(servers: Sequence[Server], checkpoint: Path, dtype: str, directory: Path) -> tuple[Start, list[Row]]:
    """Return what to ask the first server, and a row with the reason for each scenario that its start rules out.

    No request is longer than any of the servers takes.
    """
    server, shortest = servers[0], min(server.facts.max_model_len for server in servers)
    config, facts = QNextConfig.from_pretrained(checkpoint), replace(server.facts, max_model_len=shortest)
    if facts.block_size is None:  # what vLLM chooses on a GPU for one rank; with more, blocks are no longer
        served = getattr(torch, dtype)
        state = default_state_dtype("vllm", "cuda", {}, served)
        block_size = VllmCache(Serving(config, 1, 0, served), state).block_size
    else:
        block_size = facts.block_size
    for each in servers:
        each.block_size = block_size
    found = scenarios(config.vocab_size, max(1.0, block_size / BLOCK), texts(checkpoint))
    reasons = {
        name: reason for name, scenario in found.items() if (reason := _ruled_out(name, scenario, facts, server))
    }
    wanted = {
        name: replace(scenario, drafts="own", drafted=name == "drafts_of_the_model")
        for name, scenario in found.items()
        if name not in reasons
    }
    if reason := _in_one_piece(facts, wanted):
        reasons["prompts in pieces"] = reason
    cold = {name: scenario for name, scenario in wanted.items() if name in _COLD}
    rest = {name: scenario for name, scenario in wanted.items() if name not in _COLD}
    base = EngineConfig(dtype=dtype, max_model_len=facts.max_model_len)
    caching = replace(base, prefix_caching=True, warm=bool(facts.prefix_caching))
    runs: list[Run] = passes(caching, rest) + passes(base, cold)
    rows = [Row(directory.name, name, f"{NOT_EXERCISED}: {reason}") for name, reason in reasons.items()]
    return Start(server.engine, checkpoint, base, runs, directory), rows


def ask(server: Server, start: Start, say: Callable[[str], None]) -> dict[str, str]:
    """Make all runs of a start; returns the reason by the start's name if the server fails meanwhile."""
    start.directory.mkdir(parents=True)
    for run in start.runs:
        begin = time.monotonic()
        if run.reset:
            server.reset()
        try:
            server.answers(run.scenario).save(start.file(run.key))
        except ServerFailed as e:
            say(f"{start.name} {run.key}: {e}")
            return {start.name: str(e)}
        say(f"{start.name} {run.key}: {time.monotonic() - begin:.1f} s")
    return {}


def judge_by_server(
    start: Start, failures: Mapping[str, str], other: Server, directory: Path, say: Callable[[str], None]
) -> list[Row]:
    """Return the rows of a start that are judged by another server.

    In a lower precision the other one answers the same requests, which shows how far its rounding goes. Raises
    ``ServerFailed`` if it fails, and ``ValueError`` if it cannot read prompts with log-probabilities.
    """
    if not other.prompt_logprobs:
        raise ValueError(f"{other.client.url} gives no log-probabilities of prompts, by which another could be judged")
    second = Start(other.engine, start.checkpoint, start.config, start.runs, directory)
    if start.config.dtype != "float32" and (failed := ask(other, second, say)):
        raise ServerFailed(failed[second.name])
    return judge_against(start, failures, other.rows, second)


def passed(rows: Sequence[Row]) -> bool:
    """Return whether something agrees and nothing disagrees. What a server's start rules out is no failure."""
    verdicts = [row.verdict for row in rows]
    return OK in verdicts and all(v == OK or v.startswith(NOT_EXERCISED) for v in verdicts)


def notes(rows: Sequence[Row]) -> list[str]:
    """Return what the report says after its table: how much was not exercised, and whether the model is another."""
    found = []
    if idle := sum(row.verdict.startswith(NOT_EXERCISED) for row in rows):
        found.append(f"{idle} not exercised, because of how the server was started or what it says")
    compared = [row.difference for row in rows if row.difference is not None]
    positions, same = (sum(getattr(d, name) for d in compared) for name in ("positions", "same_top"))
    if positions and same < positions / 2:
        found.append(
            f"the most likely token is the same at {same / positions:.0%} of the positions: the server probably "
            "serves another model than MODEL"
        )
    return found


def description(server: Server) -> list[str]:
    """Return lines that say who answers and what is known of its start."""
    facts = server.facts
    ours = {None: "unknown, see 'is served by' in its log", True: "yes", False: "no"}[facts.ours]
    prompts = "" if server.prompt_logprobs else ", none of prompts"
    return [
        f"{server.engine} {facts.version} at {server.client.url}, model {facts.model!r}; qnext-plugin serves: {ours}",
        f"longest request: {facts.max_model_len} tokens; prefix cache: {_said(facts.prefix_caching)}; in blocks of: "
        f"{_said(facts.block_size)}; tokens in the cache: {_said(facts.cache_tokens)}; tokens in a step: "
        f"{_said(facts.step_tokens)}; drafts: {_said(facts.drafts)}",
        f"log-probabilities of each position: {server.num_logprobs} of {server.vocab_size}{prompts}",
    ]


def _said(fact: bool | int | None) -> str:
    if fact is None:
        return "not said"
    return {True: "yes", False: "no"}[fact] if isinstance(fact, bool) else str(fact)


def _ruled_out(name: str, scenario: Scenario, facts: Facts, server: Server) -> str | None:
    """Return why the way in which the server was started makes a scenario show nothing, or None."""
    total = sum(len(prompt) + scenario.max_tokens[0] for prompt in scenario.batches[0])
    if name in _CHOSEN_DRAFTS:
        return "which drafts are right cannot be chosen over HTTP"
    if name == "drafts_of_the_model" and not facts.drafts:
        return "the server does not say whether it drafts" if facts.drafts is None else "the server does not draft"
    if scenario.prompt_logprobs and not server.prompt_logprobs:
        return "the server gives no log-probabilities of prompts"
    if scenario.hits and facts.prefix_caching is False:
        return "the server has no prefix cache"
    if scenario.preempts and facts.cache_tokens is not None and facts.cache_tokens >= total:
        return f"the server's cache holds {facts.cache_tokens} tokens, and its requests have {total}"
    if scenario.longest + _ROOM > facts.max_model_len:
        return f"{scenario.longest + _ROOM} tokens are longer than the server takes, {facts.max_model_len}"
    return None


def _in_one_piece(facts: Facts, wanted: dict[str, Scenario]) -> str | None:
    """Return why no prompt is computed in pieces, as far as is known, or None."""
    if facts.step_tokens is None:
        return "the server does not say how many tokens it computes in a step"
    most = max((len(prompt) for s in wanted.values() for batch in s.batches for prompt in batch), default=0)
    if most > facts.step_tokens:
        return None
    return f"the server computes up to {facts.step_tokens} tokens in a step, and the longest prompt has {most}"


def _config(checkpoint: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    return config
