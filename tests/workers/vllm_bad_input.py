"""Start engines that must not start: ``python -m tests.workers.vllm_bad_input SPEC.json OUT.json``.

``SPEC`` maps names to ``{"model": directory, "args": {...}}``; ``OUT`` maps them to the error's text, or to null where
the engine started.
"""

import gc
import json
import os
import sys
from pathlib import Path

from qnext_plugin.engines.config import EngineConfig
from vllm_ext.tools.engine import engine_args

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main(spec_file: str, out_file: str) -> None:
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    errors = {}
    for name, case in json.loads(Path(spec_file).read_text()).items():
        print(f"--- {name}", flush=True)
        args = engine_args(case["model"], EngineConfig()) | case["args"]
        try:
            vllm.LLM(**args)
            errors[name] = None
        except Exception as e:
            errors[name] = str(e)
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(out_file).write_text(json.dumps(errors))


if __name__ == "__main__":
    main(*sys.argv[1:])
