"""SGLang's code for GPUs on a GPU that is not there: our model and SGLang's own, in every kind of batch.

``tests/test_gpu_dry_run.py`` compares what the starts recorded.
"""

import pytest

from tests.gpu.dry.report import DELTA_NET, counts, of_phase
from tests.gpu.dry.starts import SGLANG

pytestmark = [pytest.mark.only("sglang")]
EXHAUSTIVE = [pytest.param(name, marks=pytest.mark.exhaustive) for name in SGLANG.starts if name != "ours"]
TINY = ("--preset", "tiny", "--overrides", "{}")


@pytest.mark.parametrize("name", ["ours", *EXHAUSTIVE])
def test_a_start_launches_what_is_recorded(tmp_path, name):
    """It serves every kind of batch and compiles every kernel."""
    SGLANG.repeat(tmp_path, name)


DEFECTS = {
    "waits_for_the_gpu": "DataDependentOutputException",
    "tensor_on_the_cpu": "FakeTensorDeviceMismatchError",
    "another_type": "",
    "wrong_stride": "contract: fused_gdn_gating wants rows of a contiguous",
    "shape_off_by_one": "is invalid for input of size",
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_found(tmp_path, defect):
    failure = SGLANG.run(tmp_path, [*TINY, "--steps", "4", "--mutant", defect], "sglang")["failure"]
    assert failure and DEFECTS[defect] in failure


@pytest.mark.exhaustive
def test_one_copy_more_is_counted(tmp_path):
    report = SGLANG.run(tmp_path, [*TINY, "--steps", "1", "--mutant", "one_copy_more"], "sglang")
    assert counts(of_phase(report["launches"], "^capture decode 4"))[DELTA_NET]["copies"] == 1, report["failure"]
