"""Samples drawn from an engine that serves."""

from pathlib import Path
from typing import Any

from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.engines.remote import started_engine
from qnext_plugin.verify.scenarios import tokens
from tests.support.installed import ENGINE

SAMPLES, TOKENS = 10_000, 5
ARGUMENTS = {"skip_tokenizer_init": False} | {
    "vllm": {
        "max_num_seqs": 512,
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    },
    "sglang": {
        "max_running_requests": 256,
        "max_mamba_cache_size": 264,
        "constrained_json_disable_any_whitespace": True,
    },
}[ENGINE]
REGEX = "([a-d][0-9]){12}"
UNITS, NUMBERS = ("day", "week"), (1, 2, 7)
SCHEMA = {
    "type": "object",
    "properties": {
        "unit": {"type": "string", "enum": list(UNITS)},
        "numbers": {"type": "array", "items": {"type": "integer", "enum": list(NUMBERS)}, "minItems": 2, "maxItems": 4},
        "yes": {"type": "boolean"},
    },
    "required": ["unit", "numbers", "yes"],
    "additionalProperties": False,
}
WORDS = "(ab|cd|[0-9]{3}){5}-(yes|no)"
MUTANT = f"tests.mutants.{ENGINE}:verify_commits_one_step_early"


def draw(checkpoint: Path, drafts: int, root: Path) -> dict[str, Any]:
    """What an engine with ``drafts`` draft tokens answered, as the worker says; also broken by ``MUTANT``."""
    config = EngineConfig(draft_tokens=drafts, num_blocks=8192)
    with started_engine(ENGINE, str(checkpoint), config, root / f"{drafts}", arguments=ARGUMENTS) as engine:
        engine.ready(600)
        drawn: dict[str, Any] = engine.call(
            f"tests.workers.{ENGINE}_sampling:sample",
            600,
            prompt=tokens(9, seed=5),
            samples=SAMPLES,
            tokens=TOKENS,
            mutants=[MUTANT] if drafts else [],
            regex=REGEX,
            formats=[{"json": SCHEMA}, {"regex": WORDS}],
        )
    return drawn
