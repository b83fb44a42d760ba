"""Runs workers as Ray actors on CPUs: ``--distributed-executor-backend vllm_ext.ray_executor.CpuRayExecutor``.

vLLM 0.32 and 0.33 refuse Ray on CPUs, because their CPU platform names no resource to place workers by
(``compat.REPLACEMENTS``).
"""

from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2
from vllm.v1.executor.ray_utils import ray

from vllm_ext import compat

DEVICE_KEY = "CPU"


class CpuRayWorker(ray_executor_v2.RayWorkerProc):
    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        return ray.get_runtime_context().get_node_id(), []


class CpuRayExecutor(ray_executor_v2.RayExecutorV2):
    """An executor that reserves a core of a Ray node for each worker; it binds no threads: set ``OMP_NUM_THREADS``."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        if not current_platform.is_cpu():
            raise ValueError("CpuRayExecutor is for CPUs; use --distributed-executor-backend ray")
        compat.apply(vllm_config)  # models do this elsewhere, but this process builds none
        super().__init__(vllm_config)

    @staticmethod
    def _get_actor_resource_kwargs() -> dict[str, Any]:
        return {"num_gpus": 0}  # the core is reserved by the placement group
