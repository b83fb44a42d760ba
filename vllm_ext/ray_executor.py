"""Provides the name that users type: ``--distributed-executor-backend vllm_ext.ray_executor.CpuRayExecutor``."""

from vllm_ext.cpu.ray_executor import CpuRayExecutor

__all__ = ["CpuRayExecutor"]
