"""A scheduler for pipeline parallelism with MTP under vLLM's first model runner, the only one without Triton.

The user chooses it with ``--scheduler-cls vllm_ext.scheduler.PipelineDraftScheduler``.
"""

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds


class PipelineDraftScheduler(Scheduler):
    """A scheduler that keeps a step's drafts until the sampled token that they follow is known.

    A pipeline has several steps in flight, and vLLM fetches a step's drafts before its output. vLLM's own scheduler
    would schedule them at once, at the position of that token.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._drafts: dict[str, list[int]] = {}

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        self._drafts.update(zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True))

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        known = [request for request in scheduler_output.num_scheduled_tokens if request in self._drafts]
        super().update_draft_token_ids(DraftTokenIds(known, [self._drafts.pop(request) for request in known]))
        return outputs
