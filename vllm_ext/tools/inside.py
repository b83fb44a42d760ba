"""Functions that run inside a live vLLM worker, possibly in another process: they query it and control its draft.

Drafts of random weights are almost never accepted: without control, tests would see only rejected first drafts.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)  # of the first or second runner
    if drafter is None:
        return
    propose = drafter.__class__.propose

    def proposed(*args: Any, **kwargs: Any) -> Any:
        drafts = propose(drafter, *args, **kwargs)
        if isinstance(drafts, list):
            return _listed(runner, args, sequences, pattern, next(steps))
        requests = _first_requests(runner, kwargs) if hasattr(runner, "drafter") else _second_requests(runner, args[0])
        return _tensor(requests, drafts, sequences, pattern, next(steps))

    if pattern == "own":
        drafter.__dict__.pop("propose", None)
    else:
        drafter.propose = proposed


def _first_requests(runner: Any, kwargs: dict[str, Any]) -> Iterator[tuple[list[int], int]]:
    """Return each request's prompt and the position of its first draft, in vLLM's first model runner."""
    last = kwargs["token_indices_to_sample"]
    if last is None:
        last = kwargs["common_attn_metadata"].query_start_loc[1:].long() - 1
    positions = kwargs["target_positions"][last.long()].tolist()
    for request, position in zip(runner.input_batch.req_ids, positions, strict=False):
        yield list(runner.requests[request].prompt_token_ids), position + 2


def _second_requests(runner: Any, batch: Any) -> Iterator[tuple[list[int], int]]:
    """Return the same in vLLM's second model runner, which keeps a request's tokens in a slot on the device."""
    states = runner.req_states
    for slot in batch.idx_mapping_np.tolist():
        length = int(states.prompt_len.np[slot])
        yield states.all_token_ids.gpu[slot, :length].tolist(), int(states.num_computed_tokens.gpu[slot]) + 1


def _tensor(
    requests: Iterable[tuple[list[int], int]],
    drafts: Tensor,
    sequences: Sequence[Sequence[int]],
    pattern: str,
    step: int,
) -> Tensor:
    """Overwrite a draft model's tokens, as many for each request."""
    depth = drafts.shape[1]
    for row, (prompt, start) in enumerate(requests):
        right = depth if pattern == "right" else (step + row) % (depth + 1)
        tokens = _continued(prompt, sequences, start, right, depth)
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
        start, prompt = int(batch.num_tokens_no_spec[row]), list(runner.requests[request].prompt_token_ids)
        drafts.append(_continued(prompt, sequences, start, right, length) if sampled[row] else [])
    return drafts


def _continued(prompt: list[int], sequences: Sequence[Sequence[int]], start: int, right: int, length: int) -> list[int]:
    """Return up to ``length`` tokens that follow in a prompt's sequence, only the first ``right`` unchanged."""
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
