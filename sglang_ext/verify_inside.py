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
        says = serving(self.tp_worker.model_runner.model) | {"retractions": num_retractions}
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
