"""Parts of speculative decoding that are SGLang's only: its kernels' CPU versions, and grammars."""

import re

import pytest

from qnext_plugin.engines import process
from tests.engines.conftest import REGEX

pytestmark = pytest.mark.engine


def test_cpu_kernels_equal_the_interpreted_ones(tmp_path):
    log = tmp_path / "log"
    assert process.run(["-m", "tests.workers.sglang_leaves"], log, {"TRITON_INTERPRET": "1"}) == 0, process.tail(log)


def test_grammar_holds_over_accepted_drafts(samples):
    grammar = samples[2]["grammar"]
    assert grammar["accepted"] > 0.85, f"right drafts were rejected: {grammar}"
    assert len(set(grammar["answers"])) == 1
    assert re.fullmatch(REGEX, grammar["answers"][0])


def test_no_request_waits_for_a_compiler(serve):
    assert serve("mtp3").serving["compiled"] == 0
