"""Functions that run inside a live vLLM worker, possibly in another process: they query it and control its draft.

Drafts of random weights are almost never accepted: without control, tests would see only rejected first drafts.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from qnext_plugin.kernel_log import KERNELS_RAN


def serving_modules(worker: Any) -> set[str]:
    """Return the modules of the classes that serve as model and, on the stage that has one, as draft."""
    runner = worker.model_runner
    models = (runner.get_model(), runner.get_draft_model())  # without the wrappers that capture CUDA graphs
    return {type(model).__module__ for model in models if model is not None}


def runner_module(worker: Any) -> str:
    """Return the module of the model runner; vLLM has two runners."""
    return type(worker.model_runner).__module__


def _drafter(worker: Any) -> Any:
    """Return the proposer on a stage that has a draft model, else None."""
    drafter = getattr(worker.model_runner, "drafter", None)
    return drafter if getattr(drafter, "model", None) is not None else None


def kernels_ran(worker: Any) -> set[str]:
    return KERNELS_RAN


def set_drafts(worker: Any, sequences: Sequence[Sequence[int]], pattern: str) -> None:
    """Propose continuations of ``sequences``, each of prompt and output; a request's prompt selects its sequence.

    ``pattern`` sets how many of a step's D drafts are right. ``right`` makes all right. ``cycle`` goes through each
    number from none to all, and differs between the requests of a batch. ``own`` lets the model draft again.
    """
    runner, steps = worker.model_runner, itertools.count()
    if getattr(runner, "speculator", None) is not None and pattern != "own":
        raise RuntimeError("vLLM's second model runner drafts by itself; start it with VLLM_USE_V2_MODEL_RUNNER=0")
    if _drafter(worker) is None:
        return
    propose = runner.drafter.__class__.propose

    def proposed(**kwargs: Any) -> torch.Tensor:
        drafts = propose(runner.drafter, **kwargs)
        last = kwargs["token_indices_to_sample"]
        if last is None:
            last = kwargs["common_attn_metadata"].query_start_loc[1:].long() - 1
        positions = kwargs["target_positions"][last.long()].tolist()
        step = next(steps)
        for row, (request, position) in enumerate(zip(runner.input_batch.req_ids, positions, strict=False)):
            sequence = _sequence(sequences, runner.requests[request].prompt_token_ids)
            if sequence is None:
                continue
            right = drafts.shape[1] if pattern == "right" else (step + row) % (drafts.shape[1] + 1)
            for i, token in enumerate(sequence[position + 2 : position + 2 + drafts.shape[1]]):
                drafts[row, i] = token if i < right else (token + 1) % 256
        return drafts

    if pattern == "own":
        runner.drafter.__dict__.pop("propose", None)
    else:
        runner.drafter.propose = proposed


def _sequence(sequences: Sequence[Sequence[int]], prompt: Sequence[int]) -> Sequence[int] | None:
    found = [s for s in sequences if list(s[: len(prompt)]) == list(prompt)]
    return max(found, key=len) if found else None


def record_draft(worker: Any) -> Callable[[], list[dict[str, Any]]]:
    """Record position and logits of each draft step of a single request.

    Return a function that stops the recording and returns the steps.
    """
    runner, steps = worker.model_runner, []
    model, propose = runner.drafter.model, runner.drafter.propose
    compute_logits = model.compute_logits

    def logits(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = compute_logits(*args, **kwargs)
        steps[-1]["logits"].append(out[0].tolist())
        return out

    def proposed(**kwargs: Any) -> torch.Tensor:
        last = kwargs["token_indices_to_sample"]
        index = int(last[0]) if last is not None else len(kwargs["target_positions"]) - 1
        steps.append({"position": int(kwargs["target_positions"][index]), "logits": []})
        return propose(**kwargs)

    model.compute_logits, runner.drafter.propose = logits, proposed

    def stop() -> list[dict[str, Any]]:
        del model.compute_logits
        runner.drafter.propose = propose
        return steps

    return stop
