"""Guards around SGLang's functions for weight updates, requests and drafts, on every device.

``compat.REPLACEMENTS`` lists where each is installed, and why.
"""

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np

from qnext_plugin.checkpoint.coverage import RefusedUpdate
from qnext_plugin.checkpoint.stored import Checkpoint

Around = Callable[..., Any]

vocab_size: int = 0
"""The vocabulary size of the model that this process serves; the model's constructor sets it."""


def begin_weight_update(original: Around, updater: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap ``WeightUpdater.begin_weight_update``: tell a model of ours that an update begins."""
    _begin(updater)
    return original(updater, *args, **kwargs)


update_weights_from_ipc = begin_weight_update


def update_weights_from_disk(original: Around, updater: Any, model_path: str, *args: Any, **kwargs: Any) -> Any:
    """Wrap ``WeightUpdater.update_weights_from_disk``: ask a model of ours before anything is changed."""
    from sglang_ext.quantization import loading_from, read_checkpoint

    try:
        checkpoint = read_checkpoint(model_path)
        _begin(updater, checkpoint)
    except ValueError as e:
        return False, f"{e}; the old weights serve on"
    with loading_from(checkpoint):
        return original(updater, model_path, *args, **kwargs)


def update_weights_from_tensor(original: Around, *args: Any, **kwargs: Any) -> Any:
    """Wrap ``WeightUpdater.update_weights_from_tensor``: return a refusal of our model as a failed update."""
    try:
        return original(*args, **kwargs)
    except RefusedUpdate as e:
        return False, str(e)


def _begin(updater: Any, checkpoint: Checkpoint | None = None) -> None:
    loading = getattr(updater.get_model(), "loading", None)
    if loading is not None:
        loading.begin(updater.get_model_runner(), checkpoint)


def validate_request(original: Around, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap ``validate_input_length``: also refuse a request that would end the scheduler process."""
    ids = np.asarray(req.origin_input_ids)  # of an array without a copy
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        message = f"token ids from {ids.min()} to {ids.max()} found, expected 0 to {vocab_size - 1}"
        req.set_finish_with_abort(message)  # the message alone does not end a request for an embedding
        return message
    if (asked := req.logprob.top_logprobs_num) > vocab_size:
        req.logprob.top_logprobs_num = 0  # a refused request is still computed along with others
        return f"{asked} log-probabilities asked for, of {vocab_size} token ids"
    return original(req, *args, **kwargs)


def extra_context_len(original: Around) -> int:
    """Wrap ``get_req_to_token_extra_context_len``: add room for all slots that a step may take in advance."""
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_page_size, get_alloc_reserve_per_decode

    return max(int(original()), get_alloc_reserve_per_decode() + get_alloc_page_size() - 1)


def ngram_drafts(original: Around, corpus: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Wrap ``NgramCorpus.batch_get``: make the drafts that follow a tree's root differ from each other.

    It returns tokens [N * D] and masks [N * D * D], which tell which token of a tree sees which. A tree with fewer
    matches than places is filled up with token 0 after the root.
    """
    tokens, masks = original(corpus, *args, **kwargs)
    size = corpus.draft_token_num
    follows_root = masks.reshape(-1, size, size).sum(2) == 2
    for tree, follows in zip(tokens.reshape(-1, size), follows_root, strict=True):
        taken = set(tree[follows].tolist())
        unused = (token for token in count() if token not in taken)
        seen = set()
        for node in follows.nonzero()[0]:
            if tree[node] in seen:
                tree[node] = next(unused)
            seen.add(tree[node])
    return tokens, masks
