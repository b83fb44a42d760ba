"""Check LoRA adapters, as PEFT writes them, against the configuration before an engine serves them.

An adapter adds ``scale * lora_B @ lora_A`` to the weight of a module. ``lora_A`` is ``[rank, in]``, ``lora_B`` is
``[out, rank]``. The rows of ``lora_B`` are in the order of the checkpoint's weight; for the input projections
``layouts.ungroup`` reorders them under the suffix ``lora_B.weight``.
"""

from collections.abc import Mapping

from torch import Tensor

from qnext_plugin.checkpoint.listing import listing
from qnext_plugin.checkpoint.schema import expected_tensors
from qnext_plugin.config import QNextConfig

Pair = tuple[Tensor | None, Tensor | None]


def check_adapter(config: QNextConfig, modules: Mapping[str, Pair]) -> None:
    """Raise one ``ValueError`` that lists every module that does not fit.

    ``modules`` maps the checkpoint's module names to ``(lora_A, lora_B)``. Engines do not notice these errors: they
    look only at the last part of a name, and copy a tensor that is too small into a part of the parameter.
    """
    weights = expected_tensors(config, mtp=False)
    unknown, half, wrong = [], [], []
    for name, (a, b) in modules.items():
        weight = weights.get(f"{name}.weight", ())
        if len(weight) != 2:
            unknown.append(name)
        elif a is None or b is None:
            half.append(f"{name}.lora_{'A' if a is None else 'B'}")
        elif (b.shape[0], a.shape[1]) != weight or a.shape[0] != b.shape[1]:
            found = f"lora_B {list(b.shape)} lora_A {list(a.shape)}"
            wrong.append(f"{name} {found}, expected [{weight[0]}, rank] [rank, {weight[1]}]")
    labels = {"not in this model": unknown, "missing": half, "wrongly shaped": wrong}
    if problems := [listing(label, lines) for label, lines in labels.items() if lines]:
        raise ValueError(
            "adapter does not fit this model: " + "; ".join(problems) + "; serve it with the model it was trained on"
        )
