"""New weights for a running SGLang, by every way in."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

from sglang_ext.tools.engine import Engine
from tests.support.buckets import buckets, transformers5
from tests.support.matrix import SCENARIOS


def weights(directory: str, **changes: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    return sorted((load_file(Path(directory) / "model.safetensors") | changes).items())


def answer(engine: Engine, directory: str, step: str) -> None:
    engine.run(SCENARIOS["short"], reset=True).save(Path(directory) / f"{step}.short.safetensors")


def reload(served: Engine, checkpoints: dict[str, str], directory: str) -> dict[str, str]:
    """As in ``vllm_reload``; a mix of old and new weights is loaded at the end, so that nothing can be asked then."""
    engine = served.engine
    errors: dict[str, str] = {}

    def note(step: str) -> None:
        answer(served, directory, step)

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

    old, new = weights(checkpoints["old"]), weights(checkpoints["new"])
    note("fresh")
    for step, source, size in (("megabytes", new, 2**20), ("kilobytes", old, 2**16)):
        sent = buckets(transformers5(source), size)
        assert len(sent) > 2 and not tensors(*sent)
        note(step)
    assert not disk(checkpoints["new"])
    note("disk")
    assert not tensors(old[: len(old) // 2], old[len(old) // 2 :])
    note("tensors")
    k_proj, misshapen = "model.layers.3.self_attn.k_proj.weight", torch.zeros(3, 5)
    refused: dict[str, Callable[[], str]] = {
        "disk missing": lambda: disk(checkpoints["missing"]),
        "disk misshapen": lambda: disk(checkpoints["misshapen"]),
        "disk without mtp": lambda: disk(checkpoints["undrafted"]),
        "draft misshapen": lambda: tensors([("mtp.fc.weight", misshapen)], selector="draft"),
        "tensors misshapen": lambda: tensors(weights(checkpoints["new"], **{k_proj: misshapen})),
        "tensors unknown": lambda: tensors(
            [*weights(checkpoints["new"]), ("model.layers.3.self_attn.surprise", misshapen)]
        ),
    }
    for name, call in refused.items():
        errors[name] = call()
        note(name)
    # A later part that does not fit comes too late: some of the tensors are new already.
    errors["late"] = tensors(new[: len(new) // 2], [(k_proj, misshapen)])
    assert not disk(checkpoints["new"])
    note("recovered")
    errors["late again"] = tensors(old[: len(old) // 2], [(k_proj, misshapen)])
    return errors
