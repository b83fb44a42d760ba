"""SGLang's code for GPUs on a GPU that is not there: what fails, waits, copies or is launched.

Each start is held against one with SGLang's own model: in every phase ours launches and copies at most as much.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qnext_plugin.checkpoint.make_random import PRESETS
from tests.gpu.dry.report import ATTENTION, COPIES, DELTA_NET, EXPERTS, counts, layer_of, of_phase
from tests.gpu.dry.trace import GPUS

pytestmark = pytest.mark.exhaustive
ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "gpu.md"
STARTS = {
    "ours": [],
    "ours, drafts": ["--drafts", "3"],
    "native": ["--native"],
    "native, drafts": ["--native", "--drafts", "3"],
}
# Graphs: a step of four sequences, or 128 tokens of prompts without attention and delta rule.
PHASES = {
    "decode": ("", "^capture decode 4"),
    "verify 3 drafts": (", drafts", "^capture verify 4"),
    "draft": (", drafts", "^capture draft 4"),
    "draft extend": (", drafts", "^capture draft extend 4"),
    "prompts": ("", "^capture prefill 128"),
}
BUDGETS = {
    "decode": {DELTA_NET: 6, ATTENTION: 6, EXPERTS: 11},
    "verify 3 drafts": {DELTA_NET: 7, ATTENTION: 6, EXPERTS: 11},
}
LAYERS, ATTENTION_EVERY = PRESETS["80b"]["num_hidden_layers"], PRESETS["80b"]["full_attention_interval"]


def start(out: Path, *arguments: str) -> dict:
    log = out.with_suffix(".log")
    command = [sys.executable, "-m", "tests.gpu.dry.sglang_start", str(out), *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with log.open("w") as output:
        env = os.environ | {"PYTHONPATH": path}
        subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, timeout=1200, env=env)
    assert out.exists(), log.read_text()[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A function that returns the report of a start by its name; two run at once."""
    root = tmp_path_factory.mktemp("dry")
    with ThreadPoolExecutor(2) as pool:
        found = {name: pool.submit(start, root / f"{i}.json", *STARTS[name]) for i, name in enumerate(STARTS)}
        yield lambda name: found[name].result()
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def captured(started):
    """A function that returns what our graph of a phase holds, or that of SGLang's own model."""

    def launches(side, phase):
        which, pattern = PHASES[phase]
        found = of_phase(started(f"{side}{which}")["launches"], pattern)
        return [launch for launch in found if launch["kind"] != "graph"]

    return launches


def copies(launches):
    return sum(launch["kind"] in COPIES for launch in launches)


@pytest.mark.parametrize("name", STARTS)
def test_everything_runs_and_compiles(started, name):
    report = started(name)
    assert not report["failure"], report["failure"]
    model = "sglang.srt.models.qwen3_next" if name.startswith("native") else "sglang_ext.model"
    assert report["served"] == {"model": model, "overlap": True, "unfinished": 0}
    failed = [k for k in report["kernels"] if k["error"] or (k["shared"] or 0) > GPUS[90][3]]
    assert len(report["kernels"]) > 30 and not failed


@pytest.mark.parametrize("name", ["ours", "ours, drafts"])
def test_nothing_in_a_graph_waits_for_the_gpu(started, name):
    assert not [event for event in started(name)["events"] if event["capturing"]]


@pytest.mark.parametrize("phase", BUDGETS)
def test_launches_of_a_layer_stay_in_the_budget(captured, phase):
    found = counts(captured("ours", phase))
    assert {part: each["launches"] for part, each in found.items()} == BUDGETS[phase]
    assert not any(each["copies"] for each in found.values())


@pytest.mark.parametrize("phase", BUDGETS)
def test_two_streams_share_a_layer(captured, phase):
    streams = {part: set() for part in (DELTA_NET, EXPERTS)}
    for launch in captured("ours", phase):
        layer = layer_of(launch)
        if layer is not None and layer[1] in streams:
            streams[layer[1]].add(launch["stream"])
    assert len(streams[DELTA_NET]) == len(streams[EXPERTS]) == 2, streams


@pytest.mark.parametrize("phase", PHASES)
def test_no_phase_launches_or_copies_more_than_sglang_does(captured, phase):
    ours, native = captured("ours", phase), captured("native", phase)
    assert 0 < len(ours) <= len(native) and copies(ours) <= copies(native)


def all_layers(launches):
    """What a graph of all layers would hold, by the first DeltaNet and the first attention layer."""
    by_layer = Counter(launch["module"].split(".")[2] if ".layers." in launch["module"] else "" for launch in launches)
    attention = LAYERS // ATTENTION_EVERY
    return by_layer[""] + (LAYERS - attention) * by_layer["0"] + attention * by_layer[str(ATTENTION_EVERY - 1)]


def table(captured):
    rows = ["| Launches in a graph | ours | SGLang's own |", "|---|---|---|"]
    for phase in PHASES:
        sides = [captured(side, phase) for side in ("ours", "native")]
        if phase in BUDGETS:
            for part in (DELTA_NET, EXPERTS):
                cells = (counts(side)[part]["launches"] for side in sides)
                rows.append(f"| {phase}: `{part}` | {' | '.join(map(str, cells))} |")
            rows.append(f"| {phase}: {LAYERS} layers | {' | '.join(str(all_layers(side)) for side in sides)} |")
        else:
            layers = "1 layer" if phase.startswith("draft") else "4 layers"
            rows.append(f"| {phase}: {layers} | {' | '.join(str(len(side)) for side in sides)} |")
        rows.append(f"| {phase}: copies in 4 layers | {' | '.join(str(copies(side)) for side in sides)} |")
    return "\n".join(rows)


BEGIN, END = "<!-- dry run: sglang -->\n", "\n<!-- end of dry run -->"


def test_the_document_has_these_figures(captured):
    """Where they change, this writes them and fails."""
    found = table(captured)
    before, rest = DOCUMENT.read_text().split(BEGIN)
    old, after = rest.split(END, 1)
    if old != found:
        DOCUMENT.write_text(before + BEGIN + found + END + after)
    assert old == found


DEFECTS = {
    "waits_for_the_gpu": "DataDependentOutputException",
    "tensor_on_the_cpu": "FakeTensorDeviceMismatchError",
    "another_type": "",
    "wrong_stride": "contract: fused_gdn_gating wants rows of a contiguous",
    "shape_off_by_one": "is invalid for input of size",
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_found(tmp_path, defect):
    options = ("--preset", "tiny", "--overrides", "{}", "--steps", "4", "--mutant", defect)
    failure = start(tmp_path / "out.json", *options)["failure"]
    assert failure and DEFECTS[defect] in failure


def test_one_copy_more_is_counted(tmp_path):
    options = ("--preset", "tiny", "--overrides", "{}", "--steps", "1", "--mutant", "one_copy_more")
    report = start(tmp_path / "out.json", *options)
    assert counts(of_phase(report["launches"], "^capture decode 4"))[DELTA_NET]["copies"] == 1, report["failure"]


@pytest.mark.parametrize(
    ("capability", "flags"),
    [
        (80, ["--attention-backend", "triton"]),
        (100, ["--attention-backend", "triton", "--moe-runner-backend", "triton"]),
    ],
)
def test_other_gpus(tmp_path, capability, flags):
    report = start(tmp_path / "out.json", "--drafts", "3", "--capability", str(capability), *flags)
    assert not report["failure"], report["failure"]
    failed = [k for k in report["kernels"] if k["error"] or (k["shared"] or 0) > GPUS[capability][3]]
    assert not failed and not [event for event in report["events"] if event["capturing"]]
