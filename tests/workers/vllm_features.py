"""What trainers and poolers ask of vLLM."""

import gc
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from qnext_plugin.engines.config import EngineConfig
from vllm_ext.tools.engine import engine_args

LAYERS = (0, 2, 4)
"""Whose inputs an EAGLE3 draft would read."""


def start(model: Path, **more: Any) -> Any:
    from vllm import LLM

    config = EngineConfig(num_blocks=48, max_model_len=512)
    llm = LLM(**engine_args(str(model), config, skip_tokenizer_init=False, **more))
    model_class = type(worker(llm).model_runner.model)
    assert any(cls.__module__ == "vllm_ext.model" for cls in model_class.__mro__), model_class.__mro__
    return llm


def worker(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def generation(root: Path, prompts: list[list[int]]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import bind_routed_experts_capturer

    llm = start(root / "base", enable_prompt_embeds=True)
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, detokenize=False)
    said = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    embedding = worker(llm).model_runner.model.embed_input_ids
    from_embeds = llm.generate([{"prompt_embeds": embedding(torch.tensor(prompt))} for prompt in prompts], params)

    # What vLLM's second model runner, which CPUs have not, asks of the model to return routed experts.
    runner, seen, routed = worker(llm).model_runner, [], {}
    bind_routed_experts_capturer(runner.model, SimpleNamespace(capture=lambda layer, ids: routed.update({layer: ids})))
    runner.model.set_aux_hidden_state_layers(LAYERS)
    runner.use_aux_hidden_state_outputs = True
    hook = runner.model.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    experts, states = [], []
    for prompt in prompts:
        llm.generate([{"prompt_token_ids": prompt}], SamplingParams(max_tokens=1, detokenize=False))
        layers = range(max(routed) + 1)  # nothing is routed in a dense one
        rows = [routed[i][: len(prompt)].long() if i in routed else torch.zeros(len(prompt), 2) for i in layers]
        experts.append(torch.stack(rows, 1))
        states.append({layer: x[: len(prompt)].clone() for layer, x in zip(LAYERS, seen.pop(), strict=True)})
    hook.remove()
    return {
        "tokens": [torch.tensor(output.outputs[0].token_ids) for output in said],
        "tokens from embeddings": [torch.tensor(output.outputs[0].token_ids) for output in from_embeds],
        "routed experts": experts,
        "hidden states": states,
    }


def embeddings(root: Path, prompts: list[list[int]], model: str = "base") -> dict[str, Any]:
    llm = start(root / model, runner="pooling", convert="embed")
    outputs = llm.embed([{"prompt_token_ids": prompt} for prompt in prompts])
    return {f"embeddings, {model}": [torch.tensor(output.outputs.embedding) for output in outputs]}


def classes(root: Path, prompts: list[list[int]]) -> dict[str, Any]:
    outputs = start(root / "classifier").classify([{"prompt_token_ids": prompt} for prompt in prompts])
    return {"classes": [torch.tensor(output.outputs.probs) for output in outputs]}


def refused(root: Path, **asked: bool) -> dict[str, Any]:
    start(root / "base", **asked)
    return {}


def run(directory: str, out_file: str) -> None:
    """Ask everything of the checkpoints ``base``, ``tied`` and ``classifier``, on the prompts in ``prompts.json``.

    ``out_file`` maps the names of what was asked to tensors, mostly a list of one for each prompt, or to the text of an
    error.
    """
    from vllm.distributed import cleanup_dist_env_and_memory

    root, out = Path(directory), {}
    prompts = json.loads((root / "prompts.json").read_text())
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "generation": lambda: generation(root, prompts),
        "embeddings, base": lambda: embeddings(root, prompts),
        "embeddings, tied": lambda: embeddings(root, prompts, "tied"),
        "classes": lambda: classes(root, prompts),
        "sleep": lambda: refused(root, enable_sleep_mode=True),
        "return of routed experts": lambda: refused(root, enable_return_routed_experts=True),
    }
    for name, step in steps.items():
        print(f"--- {name}", flush=True)
        try:
            out |= step()
        except Exception as e:
            traceback.print_exc()
            out[name] = f"{type(e).__name__}: {e}"
        gc.collect()
        cleanup_dist_env_and_memory()
        torch.save(out, out_file)
