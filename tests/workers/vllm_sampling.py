"""Draw samples from one vLLM engine: ``python -m tests.workers.vllm_sampling SPEC.json OUT.json``.

``SPEC`` holds ``model``, ``draft_tokens``, ``prompt``, ``samples``, ``tokens`` and ``mutants`` (``module:function``);
``OUT`` maps ``""`` and each mutant to ``[samples, tokens]`` token ids, and ``accepted`` to the share of accepted first
drafts.
"""

import json
import pkgutil
import sys
from pathlib import Path

from qnext_plugin.engines.config import EngineConfig
from vllm_ext.tools.engine import Engine
from vllm_ext.tools.inside import set_drafts

SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "presence_penalty": 1.0}


def main(spec_file: str, out_file: str) -> None:
    spec = json.loads(Path(spec_file).read_text())
    config = EngineConfig(draft_tokens=spec["draft_tokens"], num_blocks=8192)
    engine = Engine(spec["model"], config, max_num_seqs=512)
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": spec["prompt"]}

    def draw(samples: int, **sampling: float) -> list[list[int]]:
        params = SamplingParams(max_tokens=spec["tokens"], ignore_eos=True, detokenize=False, **sampling)
        outputs = engine.llm.generate([prompt] * samples, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    (likely,) = draw(1, temperature=0)
    if spec["draft_tokens"]:
        engine.llm.collective_rpc(set_drafts, args=([spec["prompt"] + likely], "right"))
    before = engine.counts()
    out: dict[str, object] = {"": draw(spec["samples"], **SAMPLING)}
    if spec["draft_tokens"]:
        after = engine.counts()
        steps = after["num_drafts"] - before["num_drafts"]
        out["accepted"] = (after["num_accepted"][0] - before["num_accepted"][0]) / steps
    for name in spec["mutants"]:
        with pkgutil.resolve_name(name)(engine.worker):
            out[name] = draw(spec["samples"] // 4, **SAMPLING)
    Path(out_file).write_text(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
