"""`qnext doctor` says what is true of this environment, and of ones that are broken on purpose."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest

from qnext_plugin.cli import main
from qnext_plugin.engines.config import mtp_flags
from tests.support.installed import ENGINE

ADAPTER = f"{ENGINE}_ext"
NATIVE = {"vllm": "vllm.model_executor.models.qwen3_next.", "sglang": "sglang.srt.models.qwen3_next."}
# The environment of these tests sets another size of vLLM's caches than this flag.
FLAGS = {"vllm": [*mtp_flags("vllm", 2), "--kv-cache-memory-bytes", str(3 << 30)], "sglang": []}
ANOTHER_DRAFT = {
    "vllm": ["--speculative-config", '{"method":"ngram_gpu","num_speculative_tokens":2,"prompt_lookup_max":3}'],
    "sglang": ["--speculative-algorithm", "STANDALONE"],
}
REFUSED = {
    "vllm": "speculative method 'ngram_gpu' found",
    "sglang": "STANDALONE found without a model to draft with",
}
REPLACED = {
    "vllm": "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens",
    "sglang": "sglang.srt.managers.scheduler:validate_input_length",
}


def directory(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@pytest.fixture
def doctor(monkeypatch, capsys, libraries):
    """Returns the exit status and the report of an environment; what is in ``path`` is imported first."""

    def examine(*arguments: str, path: Path | None = None, **env: str) -> tuple[int, dict]:
        if path:
            monkeypatch.chdir(path)  # `python -m` imports from here first
            paths = [str(path), *filter(None, [os.environ.get("PYTHONPATH")])]
            monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        with libraries.forking():
            status = main(["doctor", "--engine", ENGINE, "--json", *arguments])
        (report,) = json.loads(capsys.readouterr().out)
        return status, report

    return examine


def engine_with(path: Path, edits: dict[str, tuple[str, str]]) -> None:
    """The installed engine's package once more in ``path``: links, and edited copies of some files."""
    # Not links to directories: searches in the engine's sources do not follow those.
    shutil.copytree(directory(ENGINE), path / ENGINE, copy_function=os.symlink)
    for file, (old, new) in edits.items():
        edited = path / ENGINE / file
        text = edited.read_text()
        assert old in text
        edited.unlink()
        edited.write_text(text.replace(old, new))


def version_edit(version: str) -> dict[str, tuple[str, str]]:
    text = (directory(ENGINE) / "_version.py").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("__version__ = "))
    return {"_version.py": (line, f"__version__ = {version!r}")}


@pytest.fixture(scope="module")
def described(checkpoint):
    """Exit status and report of the command on a checkpoint, with drafts where doctor takes the flags."""
    command = ["doctor", str(checkpoint("bfloat16")), "--engine", ENGINE, "--json", "--dtype", "bfloat16"]
    done = subprocess.run(
        [sys.executable, "-m", "qnext_plugin.cli", *command, *FLAGS[ENGINE]], capture_output=True, text=True
    )
    assert done.stdout.startswith("["), done.stderr
    (report,) = json.loads(done.stdout)
    return done.returncode, report


def test_names_our_classes_and_kernels(described):
    status, report = described
    assert (status, report["serves"], report["errors"]) == (0, True, [])
    assert report["in_tested_range"]
    assert report["classes"]["target"] == f"{ADAPTER}.model.Qwen3NextForCausalLM"
    assert {"prefill", "experts", "attention"} < report["kernels"].keys()
    assert REPLACED[ENGINE] in dict(report["replacements"])


@pytest.mark.only("vllm")
def test_names_the_draft_and_the_kernels_that_then_serve(described, serve):
    _, report = described
    assert not any("--block-size" in risk for risk, _ in report["risks"]), "nobody asked for a block size"
    assert any("overrides --kv-cache-memory-bytes" in risk for risk, _ in report["risks"])
    assert report["classes"]["draft"] == "vllm_ext.mtp.Qwen3NextMTP"
    ran = dict(line.split(": ") for line in serve("bfloat16-mtp2").serving["kernels"])
    assert {"prefill", "verify"} <= ran.keys()
    assert ran == {phase: report["kernels"][phase][0] for phase in ran}


def test_refuses_what_the_constructor_refuses_before_anything_is_replaced(doctor, checkpoint):
    status, report = doctor(str(checkpoint("tiny")), *ANOTHER_DRAFT[ENGINE])
    assert (status, report["serves"], report["replacements"]) == (1, False, [])
    assert any(REFUSED[ENGINE] in error for error in report["errors"]), report["errors"]


def test_names_the_native_class_when_disabled(doctor):
    status, report = doctor(QNEXT_DISABLE="1")
    assert (status, report["serves"], report["switched_off_by"]) == (1, False, ["QNEXT_DISABLE"])
    assert report["classes"]["target"].startswith(NATIVE[ENGINE])


def adapter_with(path: Path, line: str) -> None:
    """The installed adapter once more in ``path``, one of its modules with a ``line`` more."""
    shutil.copytree(directory(ADAPTER), path / ADAPTER)
    with (path / ADAPTER / "gated_attention.py").open("a") as f:
        f.write(f"\n{line}\n")


def test_adapter_that_cannot_be_imported(doctor, tmp_path):
    adapter_with(tmp_path, "raise ImportError('broken on purpose')")
    status, report = doctor(path=tmp_path)
    assert (status, report["serves"]) == (1, False)
    assert any("broken on purpose" in error and "gated_attention.py" in error for error in report["errors"])


def test_install_without_entry_points(doctor, tmp_path):
    installed = Path(str(distribution("qnext-plugin").locate_file("")))
    (metadata,) = installed.glob("qnext_plugin-*.dist-info")
    shutil.copytree(metadata, tmp_path / metadata.name)
    (tmp_path / metadata.name / "entry_points.txt").unlink()
    status, report = doctor(path=tmp_path)
    assert (status, report["serves"]) == (1, False)
    assert any("no entry point" in error and "install qnext-plugin again" in error for error in report["errors"])
    assert report["classes"]["target"].startswith(NATIVE[ENGINE])


def test_newer_engine_beside_which_ours_can_be_imported_is_served_with_a_warning(doctor, tmp_path):
    engine_with(tmp_path, version_edit("99.1.0"))
    status, report = doctor(path=tmp_path)
    assert (report["version"], report["in_tested_range"]) == ("99.1.0", False)
    assert (status, report["serves"]) == (0, True), report["errors"]
    assert any("answers may be wrong" in risk for risk, _ in report["risks"])


def test_newer_engine_that_lacks_something_serves_its_own_model(doctor, tmp_path):
    engine_with(tmp_path, version_edit("99.1.0"))
    adapter_with(tmp_path, f"from {ENGINE} import gone")
    status, report = doctor(path=tmp_path)
    assert (status, report["serves"]) == (1, False)
    assert any(f"99.1.0, with which {ADAPTER}.model cannot be imported" in error for error in report["errors"])
    assert report["classes"]["target"].startswith(NATIVE[ENGINE])
