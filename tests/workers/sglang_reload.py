"""New weights for a running SGLang, by every way in: ``python -m tests.workers.sglang_reload SPEC.json OUT.json``.

``SPEC`` and ``OUT`` as in ``vllm_reload``.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

from qnext_plugin.verify.scenarios import SCENARIOS, EngineConfig
from sglang_ext.tools.verify import Engine

CONFIG = EngineConfig("tiny", draft_tokens=3, prefix_caching=True)


def weights(directory: str, **changes: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    return sorted((load_file(Path(directory) / "model.safetensors") | changes).items())


def main(spec_file: str, out_file: str) -> None:
    spec = json.loads(Path(spec_file).read_text())
    served = Engine(spec["old"], CONFIG)
    engine = served.engine
    assert served.serving()["modules"] == ["sglang_ext.model", "sglang_ext.mtp"]
    out: dict[str, Any] = {"errors": {}}

    def note(step: str) -> None:
        served.run(SCENARIOS["short"], reset=True).save(Path(out_file).parent / f"{step}.short.safetensors")

    def disk(directory: str) -> str:
        success, message, *_ = engine.update_weights_from_disk(directory)
        return "" if success else message

    def tensors(*chunks: list[tuple[str, torch.Tensor]], selector: str = "all") -> str:
        engine.begin_weight_update(selector)
        try:
            for chunk in chunks:
                serialized = engine._serialize_tensors_per_rank(chunk, None)
                update = UpdateWeightsFromTensorReqInput(serialized_named_tensors=serialized, selector=selector)
                success, message, *_ = engine.loop.run_until_complete(
                    engine.tokenizer_manager.update_weights_from_tensor(update, None)
                )
                if not success:
                    return str(message)
        finally:
            engine.end_weight_update()
        return ""

    note("fresh")
    assert not disk(spec["new"])
    note("disk")
    old = weights(spec["old"])
    assert not tensors(old[: len(old) // 2], old[len(old) // 2 :])
    note("tensors")
    k_proj, misshapen = "model.layers.3.self_attn.k_proj.weight", torch.zeros(3, 5)
    refused: dict[str, Callable[[], str]] = {
        "disk missing": lambda: disk(spec["missing"]),
        "disk misshapen": lambda: disk(spec["misshapen"]),
        "disk without mtp": lambda: disk(spec["undrafted"]),
        "draft misshapen": lambda: tensors([("mtp.fc.weight", misshapen)], selector="draft"),
        "tensors misshapen": lambda: tensors(weights(spec["new"], **{k_proj: misshapen})),
        "tensors unknown": lambda: tensors([*weights(spec["new"]), ("model.layers.3.self_attn.surprise", misshapen)]),
    }
    for name, call in refused.items():
        out["errors"][name] = call()
        note(name)
    # A later part that does not fit comes too late: some of the tensors are new already.
    new = weights(spec["new"])
    out["errors"]["late"] = tensors(new[: len(new) // 2], [(k_proj, misshapen)])
    assert not disk(spec["new"])
    note("recovered")
    out["errors"]["late again"] = tensors(old[: len(old) // 2], [(k_proj, misshapen)])
    Path(out_file).write_text(json.dumps(out))
    print("a mix of old and new weights is asked", flush=True)
    note("mix")  # ends the server
    print("it served", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
