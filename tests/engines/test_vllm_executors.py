"""Ranks that vLLM starts or connects otherwise than one engine in one process does: data parallelism, Ray."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec

import pytest

from qnext_plugin.engines import process
from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.verify.comparison import check_conditions, compare
from qnext_plugin.verify.runner import Run, Start
from tests.support.matrix import SCENARIOS
from tests.support.references import TOLERANCE, whole

MTP = EngineConfig(draft_tokens=2, num_blocks=64)
SCENARIO = SCENARIOS["drafts_in_every_pattern"]
# Ranks work in step, so each has as many batches; of other sizes, so that they have to exchange unequal parts.
OTHER = replace(SCENARIO, batches=tuple(batch[:1:-1] for batch in SCENARIO.batches))


def run(root, checkpoint, config, scenario, rank=0, **env):
    """What one process answers; it asserts that our classes serve."""
    start = Start("vllm", checkpoint, config, [Run("answers", scenario)], root / str(rank))
    start.run(timeout=240, env=env)
    return start["answers"]


def assert_right(result, scenario, config, checkpoint):
    check_conditions(scenario, config, result)
    difference = compare(result, whole(checkpoint), TOLERANCE)
    print(f"{difference.max:.2g} at {difference.worst}; {result.num_accepted} of {result.num_drafts} accepted")
    assert difference.max <= TOLERANCE, f"{difference.max:.3g} at {difference.worst}"
    assert not difference.wrong_tokens


@pytest.mark.parametrize("experts", ["parallel", pytest.param("sharded", marks=pytest.mark.exhaustive)])
def test_data_parallel(tmp_path, checkpoint, warm, experts):
    config, port = replace(MTP, expert_parallel=experts == "parallel"), process.free_port()
    scenarios = (SCENARIO, OTHER)

    def rank(i):
        env = {"VLLM_DP_RANK": str(i), "VLLM_DP_RANK_LOCAL": str(i), "VLLM_DP_SIZE": "2"}
        env |= {"VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": str(port)}
        return run(tmp_path, checkpoint("tiny"), config, scenarios[i], i, **env)

    with warm.forking(), ThreadPoolExecutor(2) as pool:
        for result, scenario in zip(pool.map(rank, range(2)), scenarios, strict=True):
            assert_right(result, scenario, config, checkpoint("tiny"))


@pytest.mark.exhaustive
@pytest.mark.skipif(not find_spec("ray"), reason="Ray is not installed: pip install ray")
def test_ray(tmp_path, checkpoint):
    config = replace(MTP, tensor_parallel=2, executor="vllm_ext.ray_executor.CpuRayExecutor")
    assert_right(run(tmp_path, checkpoint("tiny"), config, SCENARIO), SCENARIO, config, checkpoint("tiny"))
    assert "CpuRayWorker" in (tmp_path / "0" / "log").read_text()
