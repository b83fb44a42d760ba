"""What the answers of a served model are held to: `transformers`, and the reference for what its draft computes."""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from qnext_plugin.config import QNextConfig
from qnext_plugin.reference import ReferenceModel
from qnext_plugin.verify.comparison import Difference, Result
from qnext_plugin.verify.reference import Whole
from qnext_plugin.verify.tolerances import SERVED_LOGPROB_FLOAT32
from tests.support.installed import ENGINE

TOLERANCE = SERVED_LOGPROB_FLOAT32[ENGINE]

whole = cache(Whole)  # transformers, once for each checkpoint and dtype


def compare_draft(result: Result, checkpoint: Path) -> Difference:
    """Compare every draft step's log-probabilities with the reference's MTP, first and further drafts."""
    model = ReferenceModel(QNextConfig.from_pretrained(checkpoint), load_file(checkpoint / "model.safetensors"))
    sequence = torch.tensor(result.batches[0][0].query.ids)
    _, hidden = model.forward(sequence)
    difference, steps = Difference(), result.draft_steps
    assert len(steps) > 5
    for step in steps:
        n = step["position"] + 1
        following, states = sequence[1 : n + 1], hidden[:n]
        for i, logits in enumerate(step["logits"]):
            expected, drafted = model.mtp_forward(following, states)
            actual = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
            difference.add(actual[None], expected[-1].log_softmax(-1)[None], [f"position {n}, draft {i}"])
            following = torch.cat([following, torch.tensor(logits).argmax()[None]])
            states = torch.cat([states, drafted[-1:]])
    return difference
