"""SGLang's starts on a GPU: what its server does by default, and every mode that takes other kernels or graphs."""

from typing import Any

from qnext_plugin.engines.config import EngineConfig


def _case(*scenarios: str, checkpoint: str = "80b", quick: bool = False, **config: Any) -> dict[str, Any]:
    default = {"dtype": "bfloat16", "compiled": True, "prefix_caching": True}
    return {
        "checkpoint": checkpoint,
        "config": EngineConfig(**(default | config)),
        "scenarios": scenarios,
        "quick": quick,
    }


CASES = {
    "bf16 graphs, prefix caching": _case("mixed", "prefix_aba", quick=True),
    "bf16 graphs, prefix caching, mtp 3": _case("mixed", "prefix_aba", quick=True, draft_tokens=3),
    "bf16 graphs, mtp 3 as trees": _case("mixed", "reuse", draft_tokens=3, tree=8, prefix_caching=False),
    "bf16 graphs, prefix caching without buffers": _case("prefix_aba", "multi_turn", snapshots="no_buffer"),
    "bf16 eager, chunked": _case("mixed", compiled=False, prefix_caching=False, token_budget=256),
    "f16 graphs": _case("mixed", dtype="float16"),
}
