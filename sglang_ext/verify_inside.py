"""What runs inside SGLang's scheduler process, where the model lives.

``run_scheduler`` starts it in SGLang's place: each flush of the cache also reads from a file which mutant to apply, and
writes what serves.
"""

import json
import os
import pkgutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

CONTROL = "QNEXT_VERIFY_CONTROL"


def run_scheduler(*args: Any, **kwargs: Any) -> Any:
    from sglang.srt.managers import scheduler

    flush_cache, broken = scheduler.Scheduler.flush_cache, ExitStack()
    retract_decode, num_retractions = scheduler.ScheduleBatch.retract_decode, 0

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal num_retractions
        num_retractions += 1
        return retract_decode(self, *args, **kwargs)

    def controlled(self: Any, *args: Any, **kwargs: Any) -> Any:
        control = Path(os.environ[CONTROL])
        broken.close()
        if mutant := control.read_text():
            broken.enter_context(pkgutil.resolve_name(mutant)(self.tp_worker))
        runner = self.tp_worker.model_runner
        says = serving(runner.model) | {"retractions": num_retractions, "memory": memory(runner)}
        control.with_suffix(".serving").write_text(json.dumps(says))
        return flush_cache(self, *args, **kwargs)

    scheduler.Scheduler.flush_cache = controlled
    scheduler.ScheduleBatch.retract_decode = counted
    return scheduler.run_scheduler_process(*args, **kwargs)


def serving(model: Any) -> dict[str, Any]:
    kernels = sys.modules.get("sglang_ext.kernels")
    return {
        "modules": [type(model).__module__],
        "kernels": sorted(kernels.KERNELS_RAN) if kernels else [],
    }


def memory(runner: Any) -> dict[str, Any]:
    """Sizes of this rank's caches and weights, in bytes, as they are."""
    states, keys = runner.req_to_token_pool.mamba_pool.mamba_cache, runner.token_to_kv_pool.full_kv_pool
    return {
        "states": sum(t.numel() * t.itemsize for t in (*states.conv, states.temporal)),
        "slots": states.temporal.shape[1],
        "keys_and_values": sum(t.numel() * t.itemsize for t in (*keys.k_buffer, *keys.v_buffer)),
        "tokens": keys.k_buffer[0].shape[0],
        "weights": sum(getattr(p, "plain_shape", p.shape).numel() * p.itemsize for p in runner.model.parameters()),
    }
