"""New weights for a running vLLM, by every way in."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from qnext_plugin.engines.config import EngineConfig
from tests.support.buckets import Weights, buckets, transformers5
from tests.support.matrix import SCENARIOS
from vllm_ext.tools.engine import Engine

CONFIG = EngineConfig(draft_tokens=3, num_blocks=64)


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    weights: str
    """A safetensors file."""


class FileTransfer(WeightTransferEngine):
    """A trainer's weights by way of a file; the session is handled as vLLM's own engines do."""

    init_info_cls, update_info_cls = WeightTransferInitInfo, FileUpdate

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def receive_weights(self, update_info: FileUpdate) -> None:
        self.model.load_weights(list(torch.load(update_info.weights).items()))

    def shutdown(self) -> None:
        pass


def direct(worker: Any, weights: Weights, draft: bool) -> None:
    """As a trainer's worker extension does."""
    (worker.model_runner.drafter.model if draft else worker.model_runner.model).load_weights(weights)


def reload_draft(worker: Any, directory: str) -> None:
    """As vLLM loads the trunk again from a directory."""
    from vllm.model_executor.model_loader.reload.inplace import reload_weights

    model = worker.model_runner.drafter.model
    reload_weights(model.vllm_config, model, None, directory, True)


def reload_broken(worker: Any, weights: Weights) -> None:
    """From a stream that ends in an error."""

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        yield from weights
        raise OSError("the stream broke")

    worker.model_runner.reload_weights(weights_iterator=stream())


def logits(worker: Any, draft: bool = False) -> None:
    """What a step calls that has replayed the model's graph."""
    model = worker.model_runner.drafter.model if draft else worker.model_runner.model
    model.compute_logits(torch.zeros(1, model.config.hidden_size))


class Running:
    def __init__(self, engine: Engine, directory: Path) -> None:
        self.engine, self.llm, self.directory, self.file = engine, engine.llm, directory, directory / "chunk.pt"

    def disk(self, directory: str) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": directory})

    def rpc(self, function: Callable[..., None], *args: Any) -> None:
        self.llm.collective_rpc(function, args=args)

    def direct(self, weights: Weights, draft: bool = False) -> None:
        self.rpc(direct, weights, draft)

    def transfer(self, chunks: Sequence[Weights], draft: bool = False) -> None:
        (self.llm.start_draft_weight_update if draft else self.llm.start_weight_update)()
        for chunk in chunks:
            torch.save(dict(chunk), self.file)
            self.llm.update_weights({"update_info": {"weights": str(self.file)}})
        self.llm.finish_weight_update()

    def answer(self, step: str, *scenarios: str) -> None:
        for name in scenarios:
            self.engine.run(SCENARIOS[name], reset=True).save(self.directory / f"{step}.{name}.safetensors")


def weights(directory: str, **changes: torch.Tensor | None) -> Weights:
    """A checkpoint's tensors, sorted by name, so that a module's are apart; ``None`` leaves one out."""
    tensors = load_file(Path(directory) / "model.safetensors") | changes
    return [(name, tensor) for name, tensor in sorted(tensors.items()) if tensor is not None]


def thirds(weights: Weights) -> list[Weights]:
    n = len(weights) // 3
    return [weights[:n], weights[n : 2 * n], weights[2 * n :]]


def error(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as e:
        return str(e)
    return ""


def reload(checkpoints: dict[str, str], directory: str) -> dict[str, str]:
    """The texts of the errors of the steps that have to fail; what the model answers after each step is in
    ``DIRECTORY/STEP.SCENARIO.safetensors``. ``checkpoints`` are directories by name."""
    WeightTransferEngineFactory.register_engine("file", FileTransfer)
    engine = Engine(checkpoints["old"], CONFIG, weight_transfer_config=WeightTransferConfig(backend="file"))
    modules = engine.serving()["modules"]
    assert modules == ["vllm_ext.model", "vllm_ext.mtp"], modules
    model, old, new = Running(engine, Path(directory)), weights(checkpoints["old"]), weights(checkpoints["new"])
    k_proj = "model.layers.3.self_attn.k_proj.weight"
    errors: dict[str, str] = {}

    def note(step: str, *scenarios: str) -> None:
        model.answer(step, *(scenarios or ("short",)))

    note("fresh", "short", "draft_logits")
    model.disk(checkpoints["new"])
    note("disk")
    for step, source, size in (("megabytes", old, 2**20), ("kilobytes", new, 2**16)):
        sent = buckets(transformers5(source), size)
        assert len(sent) > 2
        model.transfer(sent)
        model.transfer(sent, draft=True)
        note(step, "short", "draft_logits")
    model.direct(old)
    model.direct(old, draft=True)
    note("direct", "short", "draft_logits")
    model.transfer(thirds(new))
    model.transfer(thirds(new), draft=True)
    note("transfer", "short", "draft_logits")

    misshapen = torch.zeros(3, 5)
    refused: dict[str, Callable[[], None]] = {
        "disk missing": lambda: model.disk(checkpoints["missing"]),
        "disk misshapen": lambda: model.disk(checkpoints["misshapen"]),
        "transfer misshapen": lambda: model.transfer([weights(checkpoints["old"], **{k_proj: misshapen})]),
        "draft misshapen": lambda: model.transfer([[("mtp.fc.weight", misshapen)]], draft=True),
        "draft without mtp": lambda: model.rpc(reload_draft, checkpoints["undrafted"]),
        "broken": lambda: model.rpc(reload_broken, [item for item in old if item[0] == k_proj]),
        "direct misshapen": lambda: model.direct(weights(checkpoints["old"], **{k_proj: misshapen})),
        "direct unknown": lambda: model.direct([*old, ("model.layers.3.self_attn.surprise", misshapen)]),
        "direct part": lambda: model.direct(weights(checkpoints["old"], **{k_proj: None})),
    }
    for name, call in refused.items():
        errors[name] = error(call)
        note(name)
    # A later part that does not fit comes too late: some of the modules are new already.
    first, *_ = thirds(old)
    late = [first, [(k_proj, misshapen)]]
    errors["late"] = error(lambda: model.transfer(late))
    errors["after late"] = error(lambda: model.rpc(logits))
    model.direct(old)
    note("recovered")
    mtp = [(name, tensor) for name, tensor in old if name.startswith("mtp.")]
    errors["draft late"] = error(lambda: model.transfer([mtp, [("mtp.fc.weight", misshapen)]], draft=True))
    errors["after draft late"] = error(lambda: model.rpc(logits, True))
    model.direct(old, draft=True)
    errors["draft recovered"] = error(lambda: model.rpc(logits, True))
    # Nor can one of three projections that vLLM packs together be new alone.
    model.transfer([[item for item in new if item[0] == k_proj]])
    errors["after part"] = error(lambda: note("part"))
    return errors
