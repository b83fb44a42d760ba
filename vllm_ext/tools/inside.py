"""Functions that run inside a live vLLM worker, possibly in another process: they query it and control its draft.

Drafts of random weights are almost never accepted: without control, tests would see only rejected first drafts.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qnext_plugin.kernel_log import KERNELS_RAN


def serving_modules(worker: Any) -> set[str]:
    """Return the modules of the classes that serve as model and, on the stage that has one, as MTP draft."""
    runner, config = worker.model_runner, worker.model_runner.vllm_config.speculative_config
    models = [runner.get_model()]  # without the wrappers that capture CUDA graphs
    if config is not None and config.method == "mtp":
        models.append(runner.get_draft_model())
    return {type(model).__module__ for model in models if model is not None}


def runner_module(worker: Any) -> str:
    """Return the module of the model runner; vLLM has two runners."""
    return type(worker.model_runner).__module__


def kernels_ran(worker: Any) -> set[str]:
    return KERNELS_RAN


def set_drafts(worker: Any, sequences: Sequence[Sequence[int]], pattern: str) -> None:
    """Propose continuations of ``sequences``, each of prompt and output; a request's prompt selects its sequence.

    ``pattern`` sets how many of a step's D drafts are right. ``right`` makes all right. ``cycle`` goes through each
    number from none to all, and differs between the requests of a batch; where their number may differ too, as
    without a draft model, it proposes D, only the right ones, and one more, in turn. ``own`` lets the engine draft.
    """
    runner, steps = worker.model_runner, itertools.count()
    if getattr(runner, "speculator", None) is not None and pattern != "own":
        raise RuntimeError("vLLM's second model runner drafts by itself; start it with VLLM_USE_V2_MODEL_RUNNER=0")
    drafter = getattr(runner, "drafter", None)
    if drafter is None:
        return
    propose = drafter.__class__.propose

    def proposed(*args: Any, **kwargs: Any) -> Any:
        drafts = propose(drafter, *args, **kwargs)
        if isinstance(drafts, list):
            return _listed(worker.model_runner, args, sequences, pattern, next(steps))
        return _tensor(worker.model_runner, kwargs, drafts, sequences, pattern, next(steps))

    if pattern == "own":
        drafter.__dict__.pop("propose", None)
    else:
        drafter.propose = proposed


def _tensor(
    runner: Any, kwargs: dict[str, Any], drafts: Tensor, sequences: Sequence[Sequence[int]], pattern: str, step: int
) -> Tensor:
    """Overwrite a draft model's tokens, as many for each request."""
    last, depth = kwargs["token_indices_to_sample"], drafts.shape[1]
    if last is None:
        last = kwargs["common_attn_metadata"].query_start_loc[1:].long() - 1
    positions = kwargs["target_positions"][last.long()].tolist()
    for row, (request, position) in enumerate(zip(runner.input_batch.req_ids, positions, strict=False)):
        right = depth if pattern == "right" else (step + row) % (depth + 1)
        tokens = _continued(runner, request, sequences, position + 2, right, depth)
        drafts[row, : len(tokens)] = drafts.new_tensor(tokens)
    return drafts


def _listed(
    runner: Any, args: Sequence[Any], sequences: Sequence[Sequence[int]], pattern: str, step: int
) -> list[list[int]]:
    """Return as many tokens for each request as the pattern says; none where no token has been sampled."""
    (depth, *others), batch = args, runner.input_batch
    sampled = next(arg for arg in others if isinstance(arg, list))
    drafts: list[list[int]] = []
    for row, request in enumerate(batch.req_ids[: len(sampled)]):
        turn, right = (0, depth) if pattern == "right" else divmod(step + row, depth + 1)
        length = (depth, right, min(right + 1, depth))[turn % 3]
        start = int(batch.num_tokens_no_spec[row])
        drafts.append(_continued(runner, request, sequences, start, right, length) if sampled[row] else [])
    return drafts


def _continued(
    runner: Any, request: str, sequences: Sequence[Sequence[int]], start: int, right: int, length: int
) -> list[int]:
    """Return up to ``length`` tokens that follow in a request's sequence, only the first ``right`` unchanged."""
    prompt = list(runner.requests[request].prompt_token_ids)
    found = [sequence for sequence in sequences if list(sequence[: len(prompt)]) == prompt]
    following = max(found, key=len)[start : start + length] if found else []
    return [token if i < right else (token + 1) % 256 for i, token in enumerate(following)]


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
