"""Serve a checkpoint, then others in the same engine: ``python -m tests.workers.sglang_several SPEC.json OUT``.

``SPEC`` holds ``models`` (directories: the first one is started with, the others are loaded over it one by one),
``config`` (fields of an ``EngineConfig``) and ``scenarios`` (fields of each ``Scenario``). ``OUT/modules.json``
receives the modules of the serving classes, ``OUT/<model>.<scenario>.safetensors`` what was answered, both by number.
"""

import json
import os
import sys
from pathlib import Path

from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.verify.scenarios import Scenario
from sglang_ext.tools.engine import Engine


def main(spec_file: str, out: str) -> None:
    spec = json.loads(Path(spec_file).read_text())
    served = Engine(spec["models"][0], EngineConfig(**spec["config"]))
    (Path(out) / "modules.json").write_text(json.dumps(served.serving()["modules"]))
    for n, model in enumerate(spec["models"]):
        if n:
            success, message, *_ = served.engine.update_weights_from_disk(model)
            assert success, message
        for i, scenario in enumerate(spec["scenarios"]):
            served.run(Scenario(**scenario), reset=True).save(Path(out) / f"{n}.{i}.safetensors")
    sys.stdout.flush()
    os._exit(0)  # shutting it down can wait for ever; the caller ends the whole process group


if __name__ == "__main__":
    main(*sys.argv[1:])
