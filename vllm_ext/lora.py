"""Checks the LoRA adapters that vLLM reads against the model, and puts their rows in the order of our weights.

``load_adapter`` replaces a method of vLLM (``compat.REPLACEMENTS``), so that a model that has ``prepare_adapter`` sees
each adapter before any of it is used. ``add_adapter`` replaces the one that passes a refusal on.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.distributed_c10d import all_gather_object
from vllm.distributed import get_pp_group, get_tp_group
from vllm.lora.lora_model import LoRAModel
from vllm.lora.utils import is_in_target_modules

from qnext_plugin.checkpoint.layouts import KINDS, ungroup
from qnext_plugin.checkpoint.listing import listing
from qnext_plugin.checkpoint.lora import check_adapter
from qnext_plugin.checkpoint.merged import layer_name
from qnext_plugin.config import QNextConfig

if TYPE_CHECKING:
    from vllm.lora.model_manager import LoRAModelManager


def load_adapter(original: Callable[..., LoRAModel], worker_manager: Any, lora_request: Any) -> LoRAModel:
    """Wrap ``WorkerLoRAManager._load_adapter``: pass the adapter that it has read to the model."""
    adapter = original(worker_manager, lora_request)
    model = worker_manager._adapter_manager.model
    if hasattr(model, "prepare_adapter"):
        model.prepare_adapter(adapter)
    return adapter


def add_adapter(original: Callable[..., bool], worker: Any, lora_request: Any) -> bool:
    """Wrap ``Worker.add_lora``: if a rank refuses an adapter, the last rank alone raises, and the others answer before.

    vLLM reads the ranks' answers in order up to the first error, and would take those left for answers to later calls.
    """
    refused: list[str] = []
    error: Exception | None = None
    try:
        added = original(worker, lora_request)
    except Exception as e:
        added, error, refused = False, e, [str(e)]
    tp, pp = get_tp_group(), get_pp_group()
    for group in (tp, pp):
        each: list[list[str]] = [[] for _ in range(group.world_size)]
        all_gather_object(each, refused, group=group.cpu_group)
        refused = [reason for one in each for reason in one]
    if not refused:
        return added
    if added:
        worker.remove_lora(lora_request.lora_int_id)
    if tp.is_last_rank and pp.is_last_rank:
        raise ValueError(refused[0]) from error
    return False


def prepare(model: nn.Module, manager: "LoRAModelManager", config: QNextConfig, adapter: LoRAModel) -> None:
    """Put ``lora_B`` of the input projections in flat order; raise ``ValueError`` for an adapter that cannot be served.

    Fused tensors of routed experts have no checkpoint names; where vLLM adapts experts, we leave them to vLLM.
    """
    adapted, layers, filtered = manager.modules, dict(model.named_modules()), manager.lora_config.target_modules
    left_out = [
        name
        for name in adapter.loras
        if (layer := layer_name(name)) in layers
        and layer not in adapted
        # vLLM ignores what an adapter has for modules that --lora-target-modules excludes.
        and is_in_target_modules(layer, filtered, manager.packed_modules_mapping)
    ]
    if left_out:
        raise ValueError(
            f"{listing('adapter changes what vLLM cannot adapt here, modules', left_out)}; on a CPU these are the "
            "routed experts, with --fully-sharded-loras the input projections: merge it into the weights"
        )
    own = {name: lora for name, lora in adapter.loras.items() if "experts" not in name.split(".")}
    check_adapter(config, {name: (lora.lora_a, lora.lora_b) for name, lora in own.items()})
    for name, lora in own.items():
        if lora.lora_a.shape[0] != lora.rank:
            raise ValueError(
                f"adapter has rank {lora.lora_a.shape[0]} in {name}, and {lora.rank} in adapter_config.json: its two "
                "files do not belong together"
            )
        if kind := KINDS.get(name.rpartition(".")[2]):
            lora.lora_b = ungroup(lora.lora_b, config.gdn, kind, "lora_B.weight")
