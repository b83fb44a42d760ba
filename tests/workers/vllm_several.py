"""Checkpoints served one after the other in one process."""

import gc
import resource
import traceback
from pathlib import Path
from typing import Any

from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.verify.scenarios import Scenario
from vllm_ext.tools.engine import Engine


def layers(worker: Any) -> dict[str, Any]:
    """Names of the layers of model and draft, in the checkpoint's terms, by how they are served."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase

    from qnext_plugin.checkpoint.quantized_layers import holds_codes
    from vllm_ext.quantization import is_plain

    runner, found = worker.model_runner, {"codes": {}, "as stored": [], "dequantized": []}
    draft = getattr(getattr(runner, "drafter", None), "model", None)
    for model, rename in ((runner.model, "model."), (draft, "mtp.")):
        for name, layer in model.named_modules() if model is not None else ():
            name = rename + name.removeprefix("model.").removesuffix(".routed_experts")
            if holds_codes(layer):
                found["codes"][name] = sorted({codes.kind for codes in layer.quant_method.codes.values()})
            elif hasattr(layer, "dequantized"):
                found["dequantized"].append(name)
            elif isinstance(layer, LinearBase | RoutedExperts) and not is_plain(layer):
                found["as stored"].append(name)
    return found


def united(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``layers`` found on any rank: a stage of a pipeline has its own layers only."""
    codes = {name: kinds for rank in ranks for name, kinds in rank["codes"].items()}
    lists = {how: sorted({name for rank in ranks for name in rank[how]}) for how in ("as stored", "dequantized")}
    return {"codes": codes, **lists}


def rope_rows(worker: Any) -> dict[str, list[float]]:
    """Some rows of the table of the first full attention layer, ``[cos | sin]``, by position."""
    attention = next(m for m in worker.model_runner.model.modules() if type(m).__name__ == "GatedAttention")
    table = attention.rotary_emb.cos_sin_cache
    return {str(p): table[p].float().tolist() for p in ROPE_POSITIONS if p < len(table)}


ROPE_POSITIONS = (0, 1, 511, 512, 1023, 262_143, 262_144, 524_287, 1_000_003, 1_009_999)


def serve(cases: dict[str, dict[str, Any]], directory: str) -> dict[str, Any]:
    """By case the ``modules`` of the serving classes, the ``layers`` by how they are served, and ``rope`` rows.

    A case is a ``model`` directory, fields of an ``EngineConfig``, further ``args`` of ``vllm.LLM`` and fields of each
    of its ``scenarios``. For each of these there is the name in ``results`` of a file in ``directory``, and the largest
    resident ``memory`` so far in bytes. Where the engine did not start there is only an ``error``.
    """
    from vllm.distributed import cleanup_dist_env_and_memory

    out: dict[str, Any] = {}
    for n, (name, case) in enumerate(cases.items()):
        print(f"--- {name}", flush=True)
        try:
            engine = Engine(case["model"], EngineConfig(**case["config"]), **case["args"])
            out[name] = {
                "modules": engine.serving()["modules"],
                "layers": united(engine.llm.collective_rpc(layers)),
                "rope": engine.llm.collective_rpc(rope_rows)[-1],
            }
            out[name]["results"], out[name]["memory"] = [], []
            for i, scenario in enumerate(case["scenarios"]):
                out[name]["results"].append(f"{n}.{i}.safetensors")
                engine.run(Scenario(**scenario), reset=True).save(Path(directory) / out[name]["results"][-1])
                out[name]["memory"].append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            del engine
        except Exception as e:
            traceback.print_exc()
            out[name] = {"error": f"{type(e).__name__}: {e}"}
        gc.collect()
        cleanup_dist_env_and_memory()
    return out
