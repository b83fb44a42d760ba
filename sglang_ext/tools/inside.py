"""Code that runs inside SGLang's scheduler processes, where the models live.

``run_scheduler`` starts such a process instead of SGLang's function, and adds the remote procedure ``qnext_control``.
Its argument sets which mutant to apply, whether to count what the draft does, and what the draft proposes. It writes
what serves and what was counted to a file, because SGLang's remote procedures return nothing. Drafts of random weights
are almost never accepted: without control, tests would see only rejected first drafts.
"""

import itertools
import json
import os
import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from qnext_plugin.kernel_log import KERNELS_RAN


def run_scheduler(steps: int, *args: Any, **kwargs: Any) -> Any:
    """Run SGLang's scheduler process, which takes requests back every ``steps`` steps, if 0 only when it has to."""
    from sglang.srt.managers import scheduler

    scheduler.TEST_RETRACT, scheduler.TEST_RETRACT_INTERVAL = steps > 0, steps
    changed, wanted = ExitStack(), {"mutant": "", "drafts": {}, "record": False, "count": False}
    counts: dict[str, Any] = {"retractions": 0, "accepted": [], "draft_steps": []}
    retract_decode = scheduler.ScheduleBatch.retract_decode

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts["retractions"] += 1
        return retract_decode(self, *args, **kwargs)

    class Controlled(scheduler.Scheduler):
        def qnext_control(self: Any, directory: str, change: str) -> None:
            """Apply ``change`` and write the answer; ``change`` is JSON because SGLang passes only scalars."""
            runner = self.tp_worker.model_runner
            models, draft, changes = [runner.model], None, json.loads(change)
            wanted.update(changes)
            changed.close()
            if wanted["mutant"]:
                changed.enter_context(pkgutil.resolve_name(wanted["mutant"])(self.tp_worker))
            if self.draft_worker is not None:
                control = control_ngram
                if self.draft_worker.draft_worker is not None:
                    draft, control = self.draft_worker.draft_worker.draft_runner, control_draft
                    if self.spec_algorithm.name == "EAGLE":  # the checkpoint's own draft, which is ours too
                        models.append(draft.model)
                if changes.get("record"):
                    counts["draft_steps"] = []
                if wanted["count"]:
                    changed.enter_context(
                        control(self.draft_worker, counts, record=wanted["record"], **wanted["drafts"])
                    )
            written = Path(directory) / f"{os.getpid()}.part"
            written.parent.mkdir(exist_ok=True)
            written.write_text(json.dumps({"memory": memory(runner, draft), **counts, **serving(models)}))
            written.rename(written.with_suffix(".json"))

    scheduler.Scheduler = Controlled
    scheduler.ScheduleBatch.retract_decode = counted
    return scheduler.run_scheduler_process(*args, **kwargs)


def serving(models: Sequence[Any]) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    return {
        "compiled": counters["frames"]["total"],
        "modules": [type(model).__module__ for model in models],
        "kernels": sorted(KERNELS_RAN),
    }


def memory(runner: Any, draft: Any = None) -> dict[str, Any]:
    """Return the sizes of this rank's caches and weights in bytes, and its numbers of slots and tokens.

    They include the draft's; weights that it shares with the target count once, and packed weights as if unpacked.
    """
    states = runner.req_to_token_pool.mamba_pool.mamba_cache
    pools, models = [runner.token_to_kv_pool.full_kv_pool], [runner.model]
    if draft is not None:
        pools.append(getattr(draft.token_to_kv_pool, "full_kv_pool", draft.token_to_kv_pool))
        models.append(draft.model)
    parameters = {id(p): p for model in models for p in model.parameters()}.values()
    return {
        "states": sum(t.numel() * t.itemsize for t in (*states.conv, states.temporal)),
        "slots": states.temporal.shape[1],
        "keys_and_values": sum(t.numel() * t.itemsize for pool in pools for t in (*pool.k_buffer, *pool.v_buffer)),
        "tokens": pools[0].k_buffer[0].shape[0],
        "weights": sum(getattr(p, "plain_shape", p.shape).numel() * p.itemsize for p in parameters),
    }


@contextmanager
def control_draft(
    worker: Any,
    counts: dict[str, list[Any]],
    *,
    sequences: Sequence[Sequence[int]] = (),
    pattern: str = "own",
    record: bool = False,
) -> Iterator[None]:
    """Propose continuations of ``sequences``, each of prompt and output, and count; the prompt selects the sequence.

    ``pattern`` sets how many of a step's drafts are right, one after another on one path down the tree. ``right`` makes
    all right. ``cycle`` goes through each number from none to all, and differs between the requests of a batch. ``own``
    keeps the model's drafts. ``counts`` receives how many drafts each sequence accepted in each step. With ``record``,
    for a single request, it also receives each step's position and the logits that its drafts are drawn from.
    """
    draft, verify, rounds = worker.draft_worker.draft, worker.verify, itertools.count()
    runner, steps = worker.draft_worker.draft_runner, counts["draft_steps"]
    forward = runner.forward

    def drafted(batch: Any, **kwargs: Any) -> Any:
        result = draft(batch, **kwargs)
        if pattern != "own":
            drafts = result[0] if isinstance(result, tuple) else result
            links = drafts.retrieve_next_token, drafts.retrieve_next_sibling
            _replace(drafts.draft_token, links, batch, sequences, pattern, next(rounds))
        return result

    def verified(batch: Any, *args: Any, **kwargs: Any) -> Any:
        result = verify(batch, *args, **kwargs)
        counts["accepted"] += [n - 1 for n in result.accept_lens.tolist()]
        return result

    def recorded(forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        result = forward(forward_batch, *args, **kwargs)
        logits, mode = result.logits_output.next_token_logits, forward_batch.forward_mode
        if mode.is_decode():
            steps[-1]["logits"].append(logits[0].tolist())
        elif mode.is_draft_extend_v2():
            last = int(forward_batch.spec_info.num_accept_tokens[0]) - 1
            position = int(forward_batch.extend_prefix_lens[0]) + last
            steps.append({"position": position, "logits": [logits[last].tolist()]})
        else:
            steps.append({"position": int(forward_batch.seq_lens[0]) - 1, "logits": [logits[0].tolist()]})
        return result

    with ExitStack() as parts:
        parts.enter_context(patch.object(worker.draft_worker, "draft", drafted))
        parts.enter_context(patch.object(worker, "verify", verified))
        if record:
            parts.enter_context(patch.object(runner, "forward", recorded))
        yield


@contextmanager
def control_ngram(
    worker: Any,
    counts: dict[str, list[Any]],
    *,
    sequences: Sequence[Sequence[int]] = (),
    pattern: str = "own",
    record: bool = False,
) -> Iterator[None]:
    """Do for NGRAM what ``control_draft`` does; its trees are two chains then, whatever it has found.

    It has no draft to ``record``.
    """
    from sglang.srt.speculative.ngram_worker import _derive_tree_links

    prepare, generate, rounds = worker._prepare_draft_tokens, worker.forward_batch_generation, itertools.count()
    size = worker.draft_token_num

    def drafted(batch: Any) -> Any:
        tokens, masks = prepare(batch)
        if pattern != "own":
            chains = [[i == j or (j < i and (j == 0 or (i - j) % 2 == 0)) for j in range(size)] for i in range(size)]
            masks.reshape(-1, size, size)[:] = chains
            links = _derive_tree_links(masks, len(batch.reqs), size)
            _replace(torch.from_numpy(tokens), links, batch, sequences, pattern, next(rounds))
        return tokens, masks

    def generated(batch: Any, *args: Any, **kwargs: Any) -> Any:
        verifies = batch.forward_mode.is_decode()
        result = generate(batch, *args, **kwargs)
        counts["accepted"] += [n - 1 for n in result.accept_lens.tolist()] if verifies else []
        return result

    with (
        patch.object(worker, "_prepare_draft_tokens", drafted),
        patch.object(worker, "forward_batch_generation", generated),
    ):
        yield


def _replace(
    drafts: Any, links: tuple[Any, Any], batch: Any, sequences: Sequence[Sequence[int]], pattern: str, step: int
) -> None:
    """Make each node of a request's tree right or wrong; each step takes the path to another of the deepest leaves."""
    tokens, positions = drafts.view(len(batch.reqs), -1), batch.seq_lens.tolist()
    trees = zip(*(link.tolist() for link in links), strict=True)
    for row, (request, position, (child, sibling)) in enumerate(zip(batch.reqs, positions, trees, strict=True)):
        prompt = list(request.origin_input_ids)
        sequence = max((s for s in sequences if list(s[: len(prompt)]) == prompt), key=len, default=None)
        if sequence is None:
            continue
        ways: dict[int, list[int]] = {0: []}
        for node in range(tokens.shape[1]):
            relative = child[node]
            while relative >= 0:
                ways[relative] = [*ways[node], relative]
                relative = sibling[relative]
        deepest = [way for way in ways.values() if len(way) == max(map(len, ways.values()))]
        way = deepest[(step + row) % len(deepest)]
        right = len(way) if pattern == "right" else (step + row) % (len(way) + 1)
        for node, path in ways.items():
            if node and position + len(path) < len(sequence):
                token = sequence[position + len(path)]
                tokens[row, node] = token if node in way[:right] else (token + 1) % 256
