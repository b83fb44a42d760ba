"""The demo's training code against the oracle, its data against the chat template, and the checkpoint it left."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qnext_plugin.checkpoint.coverage import check_coverage
from qnext_plugin.checkpoint.headers import read_headers
from qnext_plugin.checkpoint.make_demo import DIRECTORY
from qnext_plugin.cli import main
from qnext_plugin.config import QNextConfig
from qnext_plugin.reference import ReferenceModel, formulas

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from demo_training import data, train, words
from demo_training import model as chunked
from demo_training.tokenizer import Encoder

CONFIG = QNextConfig.from_dict(
    train.CONFIG
    | {"hidden_size": 48, "linear_key_head_dim": 20, "linear_value_head_dim": 28, "head_dim": 24, "vocab_size": 97}
)
LENGTH = 150  # two chunks and a part of one


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    weights = chunked.init_weights(CONFIG, seed=1)
    for name, weight in weights.items():
        if weight.dim() == 1:
            weight += 0.2 * torch.randn_like(weight)
        elif not name.endswith("conv1d.weight"):
            weight *= 2
    return chunked.Model(CONFIG, weights)


@pytest.fixture(scope="module")
def oracle(model):
    return ReferenceModel(CONFIG, chunked.to_published(model.weights, CONFIG))


def test_trunk_and_drafts_are_the_reference(model, oracle):
    ids = torch.randint(CONFIG.vocab_size, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    hidden = model.trunk(ids)
    first, second = model.drafts(ids, hidden, 2)
    for row in range(len(ids)):
        logits, states = oracle.forward(ids[row])
        drafted, draft_states = oracle.mtp_forward(ids[row, 1:], states[:-1])
        close(model.logits(hidden)[row], logits)
        close(model.logits(first)[row, :-1], drafted)
        for t in (0, 66, LENGTH - 3):  # the second draft follows the first one's own hidden state
            further, _ = oracle.mtp_forward(ids[row, 1 : t + 3], torch.cat([states[: t + 1], draft_states[t : t + 1]]))
            close(model.logits(second)[row, t + 1], further[-1])


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)


def test_gradients_are_those_of_the_formulas():
    torch.manual_seed(3)
    shapes = (2, LENGTH, 2, 12), (2, LENGTH, 2, 12), (2, LENGTH, 6, 10), (2, LENGTH, 6), (2, LENGTH, 6)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    inputs[3], inputs[4] = -0.1 * inputs[3].abs(), inputs[4].sigmoid()
    grad = torch.randn(2, LENGTH, 6, 10, dtype=torch.float64)

    def by_formula(q, k, v, g, beta):
        state = torch.zeros(6, 12, 10, dtype=torch.float64)
        return torch.stack([formulas.gated_delta_rule(*row, state)[0] for row in zip(q, k, v, g, beta, strict=True)])

    assert_same_gradients(chunked.gated_delta_rule, by_formula, inputs, grad)


def test_convolution_gradients():
    torch.manual_seed(4)
    inputs = [torch.randn(3, 9, 5, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)]

    def by_torch(x, weight):
        return F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], groups=5).mT

    assert_same_gradients(chunked._CausalConv1d.apply, by_torch, inputs, torch.randn(3, 9, 5, dtype=torch.float64))


def assert_same_gradients(function, reference, inputs, grad):
    results = []
    for f in (function, reference):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = f(*leaves)
        out.backward(grad)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DIRECTORY)


@pytest.fixture(scope="module")
def encode(tokenizer):
    return Encoder(tokenizer.backend_tokenizer)


@pytest.mark.parametrize("kind", data.KINDS)
def test_documents_are_what_the_tokenizer_reads(encode, tokenizer, kind):
    maker = data.Maker(random.Random(5), encode)
    for length in (130, 600):
        text = "".join(text for text, _ in data.KINDS[kind](maker, length))
        ids = encode(text)
        assert ids == tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text


def test_documents_are_what_the_chat_template_renders(tokenizer):
    rng = random.Random(6)
    tool = data.weather_tool(rng)
    call = {
        "name": tool["function"]["name"],
        "arguments": {next(iter(tool["function"]["parameters"]["properties"])): "Zanford"},
    }
    doc = data.Document()
    doc.say("system", "Be brief.")
    doc.say("user", "Weather in Zanford")
    doc.answer(data.tool_call(tool, "Zanford"))
    doc.say("user", "<tool_response>\ncold\n</tool_response>")
    doc.answer("It is cold.")
    doc.say("user", "Hello")
    doc.answer("Good day.", "A greeting.")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Zanford"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "cold"},
        {"role": "assistant", "content": "<think>\nCold, then.\n</think>\n\nIt is cold."},
        {"role": "user", "content": "Hello"},
    ]
    render = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    said = "A greeting.\n</think>\n\nGood day.<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, **render) + said == doc.text

    rendered = {data.tools_block(rng, tool, "Be brief.") for _ in range(20)}
    system = tokenizer.apply_chat_template(messages[:1], tools=[tool], tokenize=False)
    assert system in {f"<|im_start|>system\n{block}<|im_end|>\n" for block in rendered}


def test_nothing_held_out_is_trained_on(encode):
    for kind in ("recall", "pairs", "tool"):
        maker = data.Maker(random.Random(7), encode)
        text = "".join(t for _ in range(30) for t, _ in data.KINDS[kind](maker, 500))
        held_out = [*words.codes(True), *words.values(True), *words.cities(True)]
        assert len(held_out) > 500 and not [word for word in held_out if word in text]


def test_the_optimizer_learns_and_a_run_can_be_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "TOKENS", 128)
    monkeypatch.setattr(train, "Examination", lambda *_: lambda _: {})
    torch.set_num_threads(1)
    whole = train.train(tmp_path / "whole", every=3, until=6)
    train.train(tmp_path / "parts", every=3, until=3)
    assert train.train(tmp_path / "parts", every=3, until=6) == whole
    assert whole[-1] < 0.97 * whole[0]


def test_command_writes_the_whole_checkpoint(tmp_path):
    assert main(["checkpoint", "demo", str(tmp_path / "demo")]) == 0
    written = {file.name: file for file in (tmp_path / "demo").iterdir()}
    assert {name: file.read_bytes() for name, file in written.items()} == {
        file.name: file.read_bytes() for file in DIRECTORY.iterdir()
    }
    assert sum(file.stat().st_size for file in written.values()) <= 6 * 2**20
    headers = read_headers(tmp_path / "demo")
    check_coverage(QNextConfig.from_pretrained(tmp_path / "demo"), headers, mtp="required")
    assert {info.dtype for info in headers.values()} == {"BF16"}
    assert main(["checkpoint", "demo", str(tmp_path / "demo")]) == 2  # not empty


def test_checkpoint_carries_the_chat_template():
    template = (DIRECTORY.parent / "chat_template.jinja").read_text()
    assert json.loads((DIRECTORY / "tokenizer_config.json").read_text())["chat_template"] == template
