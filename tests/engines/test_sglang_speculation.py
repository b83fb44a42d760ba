"""Parts of speculative decoding that are SGLang's only: its kernels' CPU versions, and grammars."""

import re
from types import SimpleNamespace

from tests.support.sampling import REGEX
from tests.support.workers import call


def test_cpu_kernels_equal_the_interpreted_ones(tmp_path):
    call("sglang_leaves:check", tmp_path / "worker", env={"TRITON_INTERPRET": "1"})


def test_grammar_holds_over_accepted_drafts(samples):
    grammar = samples[2]["grammar"]
    assert grammar["accepted"] > 0.85, f"right drafts were rejected: {grammar}"
    assert len(set(grammar["answers"])) == 1
    assert re.fullmatch(REGEX, grammar["answers"][0])


def test_no_request_waits_for_a_compiler(serve):
    assert serve("mtp3").serving["compiled"] == 0


def test_a_measured_round_is_answered_as_if_it_were_the_first():
    from sglang_ext.tools.engine import Engine

    class Remembers:
        known = True  # what NGRAM would draft from
        loop = SimpleNamespace(run_until_complete=lambda flushed: flushed)

        @property
        def tokenizer_manager(self):
            return self

        def flush_cache(self, timeout_s):
            self.known = False
            return SimpleNamespace(success=True)

        def generate(self, input_ids, sampling_params):
            return [{"output_ids": [int(self.known)], "meta_info": {}}]

    engine = Engine.__new__(Engine)
    engine.engine = Remembers()
    assert engine.answer([[5, 6]], 1).token_ids == [[0]]
