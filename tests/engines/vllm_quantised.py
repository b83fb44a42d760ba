"""Serve quantised checkpoints one after the other: ``python -m tests.engines.vllm_quantised SPEC.json OUT.json``.

``SPEC`` maps names to checkpoint directories; ``OUT`` maps them to what the engine answered, with the modules of the
serving classes, the layers served as stored and those dequantised while loading, or to ``error`` where it did not start.
"""

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from qnext_plugin.verify.scenarios import EngineConfig, Scenario, tokens
from vllm_ext.verify import Engine
from vllm_ext.verify_inside import serving_modules

CONFIG = EngineConfig("", dtype="bfloat16", draft_tokens=2, num_blocks=64)
SCENARIO = Scenario((tuple(tokens(length, seed=length) for length in (1, 7, 40, 130)),), configs=(), drafts="cycle")


def layers(worker: Any) -> dict[str, list[str]]:
    """Names of the layers of model and draft, in the checkpoint's terms, by how they are served."""
    from vllm_ext.quantization import is_plain

    runner, found = worker.model_runner, {"as stored": [], "dequantised": []}
    for model, rename in ((runner.model, "model."), (runner.drafter.model, "mtp.")):
        for name, layer in model.named_modules():
            name = rename + name.removeprefix("model.")
            if hasattr(layer, "dequantised"):
                found["dequantised"].append(name)
            elif hasattr(layer, "quant_method") and not is_plain(layer):
                found["as stored"].append(name)
    return found


def main(spec_file: str, out_file: str) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    results: dict[str, Any] = {}
    for name, directory in json.loads(Path(spec_file).read_text()).items():
        print(f"--- {name}", flush=True)
        try:
            engine = Engine(directory, CONFIG)
            modules = set().union(*engine.llm.collective_rpc(serving_modules))
            results[name] = {
                "modules": sorted(modules),
                "layers": layers(engine.worker),
                "result": engine.run(SCENARIO),
            }
            del engine
        except Exception as e:
            traceback.print_exc()
            results[name] = {"error": f"{type(e).__name__}: {e}"}
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(out_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
