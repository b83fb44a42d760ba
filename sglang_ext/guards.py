"""Guards around what SGLang does with updates of weights, adapters and requests, on every device."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from qnext_plugin.checkpoint.schema import RefusedUpdate
from sglang_ext.patching import hook


@cache
def guard_weight_updates() -> None:
    """Tell our models that an update begins, and answer one that they refuse; idempotent.

    SGLang 0.5.23 ends the scheduler process where tensors do not fit, and goes back to the old weights by reading the
    new files again. It can go when an update is refused before it changes anything.
    """
    Around = Callable[..., Any]

    def note(updater: Any, directory: str | None = None) -> None:
        loading = getattr(updater.get_model(), "loading", None)
        if loading is not None:
            loading.begin(updater.get_model_runner(), directory)

    def begin(original: Around, updater: Any, *args: Any, **kwargs: Any) -> Any:
        note(updater)
        return original(updater, *args, **kwargs)

    def from_disk(original: Around, updater: Any, model_path: str, *args: Any, **kwargs: Any) -> Any:
        from sglang_ext.quantization import loading_from, read_stored

        try:
            note(updater, model_path)
            stored = read_stored(model_path)
        except ValueError as e:
            return False, f"{e}; the old weights serve on"
        with loading_from(stored):
            return original(updater, model_path, *args, **kwargs)

    def from_tensor(original: Around, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except RefusedUpdate as e:
            return False, str(e)

    updater = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater."
    hook(
        "AROUND",
        {
            updater + "begin_weight_update": begin,
            updater + "update_weights_from_disk": from_disk,
            updater + "update_weights_from_ipc": begin,
            updater + "update_weights_from_tensor": from_tensor,
        },
    )


@cache
def prepare_adapters() -> None:
    """Let a model with ``prepare_adapter`` say what to make of each LoRA adapter's tensors; idempotent.

    SGLang 0.5.23 sorts them by the last parts of their names, takes a draft's for those of the first layers, and
    leaves out in silence what it has no place for. It can go when it lets a model see an adapter first.
    """

    def process(original: Callable[..., None], adapter: Any, name: str, tensor: torch.Tensor) -> None:
        if hasattr(adapter.base_model, "prepare_adapter"):
            adapter.__dict__.setdefault("tensors_read", {})[name] = tensor.cpu()
        else:
            original(adapter, name, tensor)

    def normalize(original: Callable[..., None], adapter: Any) -> None:
        if hasattr(adapter.base_model, "prepare_adapter"):
            adapter.base_model.prepare_adapter(adapter, adapter.__dict__.pop("tensors_read", {}))
        original(adapter)

    adapter = "sglang.srt.lora.lora.LoRAAdapter."
    hook("AROUND", {adapter + "_process_weight": process, adapter + "_normalize_weights": normalize})


@cache
def guard_vocabulary(vocab_size: int) -> None:
    """Answer a request with ids outside the vocabulary, or for more log-probabilities than it has ids; idempotent.

    With SGLang 0.5.23 either ends the scheduler process. It can go when SGLang checks them.
    """

    def validate(original: Callable[..., Any], req: Any, *args: Any, **kwargs: Any) -> Any:
        ids = req.origin_input_ids
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            message = f"token ids from {min(ids)} to {max(ids)} found, expected 0 to {vocab_size - 1}"
            req.set_finish_with_abort(message)  # what is returned here ends no request for an embedding
            return message
        if (asked := req.logprob.top_logprobs_num) > vocab_size:
            req.logprob.top_logprobs_num = 0  # what is refused is still computed with what runs beside it
            return f"{asked} log-probabilities asked for, of {vocab_size} token ids"
        return original(req, *args, **kwargs)

    hook("AROUND", {"sglang.srt.managers.scheduler.validate_input_length": validate})
