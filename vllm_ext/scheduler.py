"""Provides the name that users type: ``--scheduler-cls vllm_ext.scheduler.PipelineDraftScheduler``."""

from vllm_ext.cpu.scheduler import PipelineDraftScheduler

__all__ = ["PipelineDraftScheduler"]
