"""vLLM on a GPU that is not there: our model and vLLM's own, in every kind of batch; see ``docs/gpu.md``.

``scripts/setup dry`` makes the environment. The figures stand in ``docs/gpu.md``: where they change, the test writes
them and fails.
"""

import json
import subprocess
from pathlib import Path

import pytest

from tests.gpu.dry.report import PARTS, counts, of_phase

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- dry run: vllm -->\n", "<!-- end of dry run -->\n"
TIMEOUT = 900
DRAFTS = 2

pytestmark = [pytest.mark.only("vllm"), pytest.mark.exhaustive]

# The kinds of batches that the start computes, by the pattern of a phase's name in its record.
PHASES = {
    "verify, no drafts": r"^run \[1, 1\]$",
    "verify, captured": r"^capture Model ",
    "prompts": r"^run \[5, 70\]$",
    "drafts beside a prompt": r"^run \[3, 3, 1000\]$",
    "a prompt in pieces": r"^run \[773, 3\]$",
}


def start(directory, *arguments):
    """Start a dry run in its own environment and return its process."""
    activate = ROOT / ".qnext" / "dry" / "activate"
    assert activate.exists(), "run scripts/setup dry first"
    command = f"source {activate} && exec python -m tests.gpu.dry.vllm_start {' '.join(map(str, arguments))}"
    log = (directory / f"{Path(arguments[0]).stem}.log").open("w")
    return subprocess.Popen(["bash", "-c", command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The records of our model and of vLLM's own."""
    directory = tmp_path_factory.mktemp("dry")
    files = {side: directory / f"{side}.json" for side in ("ours", "native")}
    extra = {"ours": (), "native": ("--native",)}
    processes = {side: start(directory, file, "--drafts", DRAFTS, *extra[side]) for side, file in files.items()}
    try:
        for process in processes.values():
            process.wait(TIMEOUT)
    finally:
        for process in processes.values():
            process.kill()
    missing = [side for side, file in files.items() if not file.exists()]
    assert not missing, "\n".join((directory / f"{side}.log").read_text()[-3000:] for side in missing)
    return {side: json.loads(file.read_text()) for side, file in files.items()}


def test_it_starts_serves_and_compiles_every_kernel(records):
    for record in records.values():
        assert not record["failure"], record["failure"]
        assert record["served"]["unfinished"] == 0 and record["served"]["runner"] == "vllm.v1.worker.gpu.model_runner"
        assert not [kernel for kernel in record["kernels"] if kernel["error"]]
    assert records["ours"]["served"]["model"] == "vllm_ext.model"
    assert records["native"]["served"]["model"] == "vllm.model_executor.models.qwen3_next"


def test_graphs_capture_nothing_that_waits_for_the_gpu(records):
    assert not [event for event in records["ours"]["events"] if event["capturing"]]


def test_a_prompt_is_one_step_where_it_is_one_with_vllms_own_model(records):
    ours, native = (records[side]["served"] for side in ("ours", "native"))
    assert ours["block_size"] == native["block_size"] == 576
    assert ours["first_chunks"] == native["first_chunks"] == {str(n): n for n in (500, 1000, 2000, 4000)}


def found(records, side, pattern):
    launches = of_phase(records[side]["launches"], pattern)
    assert launches, sorted({launch["phase"] for launch in records[side]["launches"]})
    return counts(launches)


@pytest.mark.parametrize("phase", PHASES)
def test_no_part_of_a_layer_launches_or_copies_more_than_vllms_own(records, phase):
    ours, native = (found(records, side, PHASES[phase]) for side in ("ours", "native"))
    for part in PARTS:
        for what in ("launches", "copies"):
            assert ours[part][what] <= native[part][what], (part, what)


def test_the_document_has_the_figures(records):
    rows = [
        "| Batch | Part of a layer | Ours | of them copies | vLLM's own | of them copies |",
        "|---|---|---|---|---|---|",
    ]
    for phase, pattern in PHASES.items():
        ours, native = (found(records, side, pattern) for side in ("ours", "native"))
        for part, name in PARTS.items():
            figures = [each[part][what] for each in (ours, native) for what in ("launches", "copies")]
            rows.append(f"| {phase} | {name} | {' | '.join(map(str, figures))} |")
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    written = before + BEGIN + "\n".join(rows) + "\n" + END + after
    if written != text:
        DOCUMENT.write_text(written)
        pytest.fail(f"{DOCUMENT} had other figures; it has been written again")


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("wait", "DataDependentOutputException"),
        ("host_tensor", "FakeTensorDeviceMismatchError"),
        ("strided_slots", "state_indices must be contiguous"),
        ("off_by_one", "out must have shape"),
    ],
)
def test_a_mistake_is_noticed(tmp_path, mistake, words):
    file = tmp_path / "mutant.json"
    assert start(tmp_path, file, "--drafts", DRAFTS, "--mutant", mistake).wait(TIMEOUT) == 1
    assert words in json.loads(file.read_text())["failure"]
