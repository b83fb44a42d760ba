"""SGLang's own scheduler, workers and graph capture on a GPU that is not there; run in a process of its own.

python -m tests.gpu.dry.sglang_start OUT.json [--native] [--drafts N] [--capability 90] [--tp N] [--model DIR]
    [FLAGS OF THE SERVER]
"""

import argparse
import json
import logging
import os
import sys
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.gpu.dry.ranks import pretend
from tests.gpu.dry.start import record, serve_without_weights, stored
from tests.gpu.dry.trace import TRACE

# Prompts that come in a step, by their lengths: alone, chunked, after a cached prefix, beside decode steps.
SCRIPT = {0: [5, 70], 4: [300], 14: [300, 40], 20: [1]}


def serve(model: Path, drafts: int, tp: int, flags: Sequence[str], steps: int) -> dict[str, Any]:
    """Start a server's scheduler, answer ``SCRIPT``, and return what served."""
    from sglang.srt.distributed import bootstrap
    from sglang.srt.distributed.device_communicators import pynccl, shm_broadcast
    from sglang.srt.managers import scheduler as s
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import breakable_cuda_graph as breakable
    from sglang.srt.plugins import load_plugins
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.server_args import PortArgs, ServerArgs

    load_plugins()
    active = breakable.rt.cudaStreamCaptureStatus.cudaStreamCaptureStatusActive
    breakable._capture_status = lambda stream: active if TRACE.capturing else None
    bootstrap.get_default_distributed_backend = lambda device: "fake"
    pretend(tp, pynccl, shm_broadcast)
    label(drafts)
    arguments = ["--model-path", str(model), "--skip-tokenizer-init"]
    arguments += ["--cuda-graph-bs-decode", "1", "4", "--cuda-graph-bs-prefill", "16", "128"]
    arguments += ["--max-running-requests", "8", "--chunked-prefill-size", "128", "--max-total-tokens", "20000"]
    if tp > 1:
        arguments += ["--tp-size", str(tp), "--disable-custom-all-reduce"]
    if drafts:
        arguments += ["--speculative-algo", "NEXTN", "--speculative-num-steps", str(drafts)]
        arguments += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(drafts + 1)]
    cli = argparse.ArgumentParser()
    ServerArgs.add_cli_args(cli)
    server_args = ServerArgs.from_cli_args(cli.parse_args([*arguments, *flags]))
    server_args.resolve_once()
    ports = PortArgs.init_new(server_args)
    s.publish(server_args, role="scheduler", ranks=s.SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    s.configure_scheduler_process = lambda *_, **__: None
    scheduler = s.Scheduler(server_args, ports)
    step = 0

    def ingest(*_: Any, **__: Any) -> None:
        nonlocal step
        for i, length in enumerate(SCRIPT.get(step, [])):
            params = SamplingParams(max_new_tokens=8, ignore_eos=True, temperature=float(i % 2), top_p=0.9, top_k=20)
            params.normalize(None)
            request = TokenizedGenerateReqInput(
                rid=f"{step}-{i}",
                input_text="",
                input_ids=array("q", range(1, length + 1)),
                input_embeds=None,
                mm_inputs=None,
                token_type_ids=None,
                sampling_params=params,
                return_logprob=i % 2 == 1,
                logprob_start_len=-1,
                top_logprobs_num=2,
                token_ids_logprob=None,
                stream=False,
            )
            scheduler.process_input_requests([request])
        step += 1
        scheduler.gracefully_exit = step > steps

    scheduler.ingest_requests = ingest
    scheduler.run_event_loop()
    return {
        "model": type(scheduler.tp_worker.model_runner.model).__module__,
        "overlap": scheduler.enable_overlap,
        "unfinished": len(scheduler.running_batch.reqs) + len(scheduler.waiting_queue),
    }


def around(cls: type, name: str, phase: Callable[..., str]) -> None:
    """Label what happens inside a method with ``phase(self, *arguments)``."""
    original = getattr(cls, name)

    def labelled(self: Any, *args: Any, **kwargs: Any) -> Any:
        with TRACE.during(phase(self, *args, **kwargs)):
            return original(self, *args, **kwargs)

    setattr(cls, name, labelled)


def label(drafts: int) -> None:
    from sglang.srt.managers import scheduler as s
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner, prefill_cuda_graph_runner
    from sglang.srt.speculative import eagle_draft_cuda_graph_runner, eagle_draft_extend_cuda_graph_runner

    def prefill(runner: Any) -> str:
        return "draft prefill" if runner.model_runner.is_draft_worker else "prefill"

    for cls, name in (
        (decode_cuda_graph_runner.DecodeCudaGraphRunner, lambda _: "verify" if drafts else "decode"),
        (prefill_cuda_graph_runner.PrefillCudaGraphRunner, prefill),
        (eagle_draft_cuda_graph_runner.EAGLEDraftCudaGraphRunner, lambda _: "draft"),
        (eagle_draft_extend_cuda_graph_runner.EAGLEDraftExtendCudaGraphRunner, lambda _: "draft extend"),
    ):
        around(cls, "capture_one_shape", lambda self, size, *_, name=name, **__: f"capture {name(self)} {size}")
    load = ModelRunner.load_model

    def named(self: Any, *args: Any, **kwargs: Any) -> Any:
        with TRACE.during("load"):
            result = load(self, *args, **kwargs)
        TRACE.name_modules(self.model, "draft:" if self.is_draft_worker else "")
        return result

    ModelRunner.load_model = named

    def batch(self: Any, batch: Any, *_: Any, **__: Any) -> str:
        mode = batch.forward_mode
        lengths = f"{batch.extend_lens} after {batch.prefix_lens}" if mode.is_extend() else len(batch.reqs)
        return f"run {mode.name.lower()} of {lengths}"

    around(s.Scheduler, "run_batch", batch)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="80b")
    parser.add_argument("--overrides", type=json.loads, default={"num_hidden_layers": 4})
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--native", action="store_true", help="SGLang's own model")
    parser.add_argument("--drafts", type=int, default=0)
    parser.add_argument("--tp", type=int, default=1, help="ranks, of which this process is the first")
    parser.add_argument("--model", type=Path, help="a checkpoint whose weights are loaded; otherwise there are none")
    parser.add_argument("--steps", type=int, default=40, help="of the scheduler's loop")
    parser.add_argument("--all-configs", action="store_true", help="compile every configuration of autotuned kernels")
    parser.add_argument("--mutant", help="a function of sglang_mutants.py that breaks something")
    options, flags = parser.parse_known_args()
    if options.native:
        os.environ["QNEXT_DISABLE"] = "1"
    os.environ["SGLANG_JIT_DEEPGEMM_PRECOMPILE"] = "0"
    from tests.gpu.dry import install, jit, sglang_ops

    mode = install.install(options.capability, sglang_ops.FAKES, all_configs=options.all_configs)
    jit.patch_sglang(nvcc=False)
    jit.patch_flashinfer()
    jit.patch_cute(options.capability)

    def serve_model(model: Path) -> dict[str, Any]:
        return serve(model, options.drafts, options.tp, [*flags, "--load-format", "dummy"], options.steps)

    def serve_stored() -> dict[str, Any]:
        served = serve(options.model, options.drafts, options.tp, flags, options.steps)
        return served | stored("k_scale", "v_scale")

    with mode:
        sglang_ops.guard_kernels()
        sglang_ops.watch_cache()
        if options.mutant:
            from tests.gpu.dry import sglang_mutants

            getattr(sglang_mutants, options.mutant)()
        if options.model:
            record(options.out, serve_stored)
        record(options.out, partial(serve_without_weights, options.preset, options.overrides, serve_model))


if __name__ == "__main__":
    main()
