"""Draw samples from one SGLang engine: ``python -m tests.workers.sglang_sampling SPEC.json OUT.json``.

``SPEC`` and ``OUT`` as in ``vllm_sampling``. With drafts, ``SPEC`` has a ``regex`` too, and ``OUT`` a ``grammar``: the
``answers`` to it, greedy, two with the model's own drafts and two with right ones, and the share of steps that
``accepted`` all of those.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from qnext_plugin.engines.config import EngineConfig
from sglang_ext.tools.engine import Engine

# SGLang applies penalties to the tokens of earlier steps only, so that with drafts they are not the same.
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
REQUESTS = 256


def main(spec_file: str, out_file: str) -> None:
    spec = json.loads(Path(spec_file).read_text())
    prompt, drafts = spec["prompt"], spec["draft_tokens"]
    engine = Engine(
        spec["model"],
        EngineConfig(draft_tokens=drafts),
        max_running_requests=REQUESTS,
        max_mamba_cache_size=REQUESTS + 8,
        skip_tokenizer_init=False,
    )

    def generate(samples: int, **sampling: Any) -> list[dict[str, Any]]:
        params = {"max_new_tokens": spec["tokens"], "ignore_eos": True, **sampling}
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
    out: dict[str, Any] = {"": draw(spec["samples"], **SAMPLING)}
    if drafts:
        out["accepted"] = accepted(before, 1)
    for name in spec["mutants"]:
        with engine.broken(name):
            out[name] = draw(spec["samples"] // 4, **SAMPLING)
    if drafts:
        engine.drafts_as("own", [])
        grammar = {"regex": spec["regex"], "max_new_tokens": 24, "temperature": 0}
        own = generate(2, **grammar)
        engine.drafts_as("right", [prompt + own[0]["output_ids"]])
        before = engine.counts()
        answers = [output["text"] for output in own + generate(2, **grammar)]
        out["grammar"] = {"answers": answers, "accepted": accepted(before, drafts)}
    Path(out_file).write_text(json.dumps(out))
    sys.stdout.flush()
    os._exit(0)  # as in sglang_ext.tools.engine


if __name__ == "__main__":
    main(*sys.argv[1:])
