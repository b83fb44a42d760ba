"""What trainers and poolers ask of SGLang."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qnext_plugin.engines.config import EngineConfig
from sglang_ext.tools.engine import Engine

LAYERS = (1, 3)
"""Whose inputs an EAGLE3 draft would read: the outputs of those before."""
GREEDY = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}


def start(model: Path, token_budget: int, **more: Any) -> Engine:
    served = Engine(str(model), EngineConfig(token_budget=token_budget, max_model_len=512), **more)
    assert served.serving()["modules"] == ["sglang_ext.model"]
    return served


def ask(served: Engine, request: Any) -> list[dict[str, Any]]:
    answers = served.engine.tokenizer_manager.generate_request(request, None)
    return list(served.engine.loop.run_until_complete(answers.__anext__()))


def generation(root: Path, prompts: list[list[int]]) -> dict[str, Any]:
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.state_capturer.routed_experts import extract_routed_experts_from_meta_info

    # SGLang returns the hidden states of a prompt's last piece only.
    served = start(root / "base", 512, enable_return_hidden_states=True, enable_return_routed_experts=True)
    asked = {"input_ids": prompts, "sampling_params": GREEDY}
    said = ask(served, GenerateReqInput(**asked, return_hidden_states=True, return_routed_experts=True))
    embedding = load_file(root / "base" / "model.safetensors")["model.embed_tokens.weight"]
    embeds = [embedding[prompt].tolist() for prompt in prompts]
    from_embeds = ask(served, GenerateReqInput(input_embeds=embeds, sampling_params=GREEDY))

    with served.broken("tests.workers.sglang_features:capturing"):
        captured = ask(served, GenerateReqInput(**asked, return_hidden_states=True))

    ids = [torch.tensor(extract_routed_experts_from_meta_info(answer)) for answer in said]
    return {
        "tokens": tokens(said),
        "tokens from embeddings": tokens(from_embeds),
        "routed experts": [each.view(len(rows), -1, 2).long() for each, rows in zip(ids, hidden(said), strict=True)],
        "last hidden states": hidden(said),
        "hidden states": [dict(zip(LAYERS, rows.chunk(len(LAYERS), -1), strict=True)) for rows in hidden(captured)],
    }


def tokens(answers: list[dict[str, Any]]) -> list[torch.Tensor]:
    return [torch.tensor(answer["output_ids"]) for answer in answers]


def hidden(answers: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Of each answer those of the prompt, then one for each token but the last."""
    return [
        torch.cat([torch.atleast_2d(torch.tensor(step)) for step in answer["meta_info"]["hidden_states"]])
        for answer in answers
    ]


@contextmanager
def capturing(tp_worker: Any) -> Iterator[None]:
    model = tp_worker.model_runner.model
    model.set_eagle3_layers_to_capture([layer - 1 for layer in LAYERS])
    yield
    model.model.layers_to_capture = frozenset()


def embeddings(root: Path, prompts: list[list[int]]) -> dict[str, Any]:
    from sglang.srt.managers.io_struct import EmbeddingReqInput

    served = start(root / "base", 64, is_embedding=True)
    answers = ask(served, EmbeddingReqInput(input_ids=prompts))
    try:
        ask(served, EmbeddingReqInput(input_ids=[[1, 10**6]]))
    except ValueError as e:
        refusal = str(e)
    assert ask(served, EmbeddingReqInput(input_ids=prompts))[0]["embedding"] == answers[0]["embedding"]
    return {"embeddings, base": [torch.tensor(answer["embedding"]) for answer in answers], "unknown token": refusal}


def run(directory: str, out_file: str, step: str) -> None:
    """Ask ``generation`` or ``embeddings`` of the checkpoint ``base`` in ``directory``, on its ``prompts.json``.

    ``out_file`` maps the names of what was asked to lists of one tensor, or what holds some, for each prompt.
    """
    root = Path(directory)
    prompts = json.loads((root / "prompts.json").read_text())
    torch.save({"generation": generation, "embeddings": embeddings}[step](root, prompts), out_file)
