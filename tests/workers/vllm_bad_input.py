"""Engines that must not start."""

import gc
from typing import Any

from qnext_plugin.engines.config import EngineConfig
from vllm_ext.tools.engine import engine_args


def errors(cases: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    """The text of the error of each case, a ``model`` directory and further ``args``; None where the engine started."""
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    found: dict[str, str | None] = {}
    for name, case in cases.items():
        print(f"--- {name}", flush=True)
        try:
            vllm.LLM(**engine_args(case["model"], EngineConfig(), **case["args"]))
            found[name] = None
        except Exception as e:
            found[name] = str(e)
        gc.collect()
        cleanup_dist_env_and_memory()
    return found
