"""What the 80B takes in memory, by the functions of ``qnext plan``: ``python -m bench.plan_80b``.

Writes ``bench/results/plan-80b.json``, from which ``scripts/figures`` draws: the bytes of the weights in each stored
format with the draft, and how many sequences of which length run at once. It needs an engine's environment, because
the tensors of a stored format come from compressed-tensors.
"""

import json
from pathlib import Path

import torch

from qnext_plugin.checkpoint.headers import TensorInfo, describe
from qnext_plugin.checkpoint.make_quantized import Quantization
from qnext_plugin.checkpoint.make_random import PRESETS
from qnext_plugin.checkpoint.schema import expected_tensors
from qnext_plugin.config import QNextConfig
from qnext_plugin.plan.caches import DEVICES, SglangCache, VllmCache
from qnext_plugin.plan.cpu import RESERVE
from qnext_plugin.plan.sizes import Serving

FILE = Path(__file__).parent / "results" / "plan-80b.json"
FORMATS = ("w8a8", "fp8-block", "w4a16", "nvfp4", "mxfp4")
GROUP_SIZE = 128
DRAFTS = 2
GIB = 2**30
LENGTHS = tuple(4**i for i in range(5, 10))
CONFIG = QNextConfig.from_dict(PRESETS["80b"])


def headers(form: str) -> dict[str, TensorInfo]:
    """Return the headers of a checkpoint with the 80B's dimensions in a stored format."""
    shapes = expected_tensors(CONFIG)
    tensors = {name: {name: torch.empty(shape, dtype=torch.bfloat16, device="meta")} for name, shape in shapes.items()}
    tensors |= Quantization(shapes, form, GROUP_SIZE).layout(torch.bfloat16)
    return {name: describe(tensor) for stored in tensors.values() for name, tensor in stored.items()}


def weights() -> dict[str, dict[str, int]]:
    """Return the bytes of the weights by format and kind."""
    serving = Serving(CONFIG, num_draft_tokens=DRAFTS)
    return {"bfloat16": serving.weights()} | {form: serving.weights(headers(form)) for form in FORMATS}


def concurrency(weights: dict[str, dict[str, int]]) -> dict[str, dict[str, dict[str, int]]]:
    """Return the sequences at once by machine, engine and length, with drafts and prefix caching."""
    desktop, server = Serving(CONFIG, num_draft_tokens=DRAFTS), Serving(CONFIG, 4, DRAFTS)
    left = int((64 - RESERVE) * GIB) - sum(weights["w4a16"].values())
    mine = sum(server.weights().values())
    # Each engine's defaults: types of states (on the CPU, one with AVX512-BF16) and most requests at once.
    vllm = VllmCache(desktop, torch.float32, DEVICES["cpu"]), VllmCache(server, torch.bfloat16)
    sglang = SglangCache(desktop, torch.float32, max_running_requests=32), SglangCache(server, torch.float32)
    rooms = {
        "64 GiB, 4 bits, on its CPU": {"vLLM": (vllm[0], left, 128), "SGLang": (sglang[0], left, 32)},
        "4 GPUs of 80 GiB, bfloat16": {
            "vLLM": (vllm[1], int((80 * 0.92 - 3) * GIB) - mine, 1024),
            "SGLang": (sglang[1], int(80 * 0.8 * GIB) - mine, 1024),
        },
    }
    return {
        machine: {
            engine: {str(n): int(min(cache.concurrency(memory, n), most)) for n in LENGTHS}
            for engine, (cache, memory, most) in engines.items()
        }
        for machine, engines in rooms.items()
    }


def main() -> None:
    found = weights()
    report = {"kind": "plan", "command": "python -m bench.plan_80b", "drafts": DRAFTS, "group size": GROUP_SIZE}
    report |= {"weights": found, "concurrency": concurrency(found)}
    FILE.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
