"""`qnext verify` from the command line: a checkpoint that is served right, and an engine that does not start."""

import json
import re

import pytest

from qnext_plugin.cli import main
from tests.support.installed import ENGINE


@pytest.fixture
def qnext_verify(tmp_path, checkpoint, warm, capsys):
    def run(*options):
        command = ["verify", str(checkpoint("odd-a")), "--engine", ENGINE, "--json", str(tmp_path / "json"), *options]
        with warm.forking():
            status = main(command)
        return status, "".join(capsys.readouterr()), json.loads((tmp_path / "json").read_text())

    return run


def test_quick(tmp_path, qnext_verify):
    status, printed, report = qnext_verify("--reference", str(tmp_path / "reference"))
    print(printed)
    assert status == 0
    assert f"['{ENGINE}_ext.model']" in printed
    rows = {row["scenario"]: row for row in report["rows"]}
    assert {row["verdict"] for row in rows.values()} == {"ok"}
    assert {"text", "prefix_aba", "multi_turn", "arrivals", "sampled", "prefix_aba again"} <= rows.keys()
    for name, row in rows.items():
        positions = row["difference"]["positions"]
        assert re.search(rf"^\| prefix +\| {name} +\| {positions}\b", printed, re.M), printed
    assert (tmp_path / "reference").exists()


@pytest.mark.exhaustive
def test_engine_that_does_not_start_is_said(qnext_verify):
    status, printed, report = qnext_verify("--no-such-flag")
    assert status == 1
    verdicts = [row["verdict"] for row in report["rows"]]
    assert re.match(r"engine failed: .*unrecognized arguments: --no-such-flag", verdicts[0]), printed
    assert set(verdicts[1:]) == {"not run"}
