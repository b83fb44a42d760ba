"""What trainers and poolers ask of the engines beyond text, against `transformers`."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3NextForCausalLM, Qwen3NextForSequenceClassification

from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.engines.who_serves import check_log
from qnext_plugin.verify.scenarios import tokens
from tests.support.installed import ENGINE
from tests.support.tolerances import SERVED_TENSOR_FLOAT32, assert_close
from tests.support.workers import call

SIZES = {
    "num_hidden_layers": 4,
    "mlp_only_layers": [1],
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "max_position_embeddings": 512,
}
LABELS = 3
PROMPTS = [tokens(length, seed=length) for length in (1, 7, 130)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("features")
    write_random_checkpoint(root / "base", dtype="float32", overrides=SIZES)
    file = root / "base" / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    embedding.copy_(embedding.bfloat16())  # as which SGLang takes prompts of embeddings
    save_file(tensors, file, metadata={"format": "pt"})
    write_random_checkpoint(root / "tied", dtype="float32", overrides=SIZES | {"tie_word_embeddings": True})
    write_classifier(root / "classifier", root / "base")
    (root / "prompts.json").write_text(json.dumps(PROMPTS))
    return root


def write_classifier(directory, base):
    """As `transformers` writes one: a head of its own for the model's, and no draft."""
    shutil.copytree(base, directory)
    tensors = {n: t for n, t in load_file(base / "model.safetensors").items() if not n.startswith(("lm_head.", "mtp."))}
    tensors["score.weight"] = torch.randn(LABELS, 96, generator=torch.Generator().manual_seed(1))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {
        "architectures": ["Qwen3NextForSequenceClassification"],
        "id2label": {str(i): f"label {i}" for i in range(LABELS)},
    }
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def answered(root, warm):
    found = {}
    for step in {"vllm": [{}], "sglang": [{"step": "generation"}, {"step": "embeddings"}]}[ENGINE]:
        directory, out = root / f"worker-{len(found)}", root / "out.pt"
        with warm.forking():
            call(f"{ENGINE}_features:run", directory, directory=str(root), out_file=str(out), **step)
        check_log(ENGINE, False, directory / "log")
        found |= torch.load(root / "out.pt")
    assert isinstance(found["tokens"], list), found
    return found


@pytest.fixture(scope="module")
def transformer(root):
    return Qwen3NextForCausalLM.from_pretrained(root / "base", dtype=torch.float32).eval()


@torch.inference_mode()
def last_states(model, ids):
    return model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]


def outputs_of(modules, model, ids):
    """What modules return, in their order, and an entry for each token of ``ids``."""
    found = []
    hooks = [module.register_forward_hook(lambda module, args, output: found.append(output)) for module in modules]
    last_states(model, ids)
    for hook in hooks:
        hook.remove()
    return found


def of_each_prompt(answered, name):
    """(token ids, what was answered) where an engine answers for each token of a prompt and maybe of the answer."""
    rows = answered[name]
    assert len(rows) == len(PROMPTS)
    for prompt, said, row in zip(PROMPTS, answered["tokens"], rows, strict=True):
        length = len(next(iter(row.values())) if isinstance(row, dict) else row)
        assert length >= len(prompt)
        yield [*prompt, *said.tolist()][:length], row


def test_routed_experts_are_those_of_each_token(answered, transformer):
    routers = [module for module in transformer.modules() if type(module).__name__ == "Qwen3NextTopKRouter"]
    sparse = [i for i in range(SIZES["num_hidden_layers"]) if i not in SIZES["mlp_only_layers"]]
    for ids, routed in of_each_prompt(answered, "routed experts"):
        for layer, output in zip(sparse, outputs_of(routers, transformer, ids), strict=True):
            assert torch.equal(routed[:, layer].sort(-1).values, output[-1].sort(-1).values), (len(ids), layer)


def test_a_prompt_may_be_embeddings(answered):
    for said, also in zip(answered["tokens"], answered["tokens from embeddings"], strict=True):
        assert torch.equal(said, also)


def test_hidden_states_for_an_eagle3_draft_are_the_inputs_of_the_layers(answered, transformer):
    modules = [transformer.model.embed_tokens, *transformer.model.layers]
    for ids, states in of_each_prompt(answered, "hidden states"):
        inputs = [
            output[0] if isinstance(output, tuple) else output for output in outputs_of(modules, transformer, ids)
        ]
        for layer, actual in states.items():
            assert_close(actual, inputs[layer][0], SERVED_TENSOR_FLOAT32, f"input of layer {layer}, {len(ids)} tokens")


@pytest.mark.parametrize("name", {"vllm": ["base", "tied"], "sglang": ["base"]}[ENGINE])
def test_an_embedding_is_the_last_hidden_state_of_length_one(answered, root, name):
    model = Qwen3NextForCausalLM.from_pretrained(root / name, dtype=torch.float32).eval()
    found = answered[f"embeddings, {name}"]
    assert isinstance(found, list), found
    for prompt, embedding in zip(PROMPTS, found, strict=True):
        expected = torch.nn.functional.normalize(last_states(model, prompt)[-1], dim=-1)
        assert_close(embedding, expected, SERVED_TENSOR_FLOAT32, f"{name}, {len(prompt)} tokens")


@pytest.mark.only("vllm")
@torch.inference_mode()
def test_a_classifier_says_what_its_own_head_makes_of_the_last_token(answered, root):
    model = Qwen3NextForSequenceClassification.from_pretrained(root / "classifier", dtype=torch.float32).eval()
    assert isinstance(answered["classes"], list), answered["classes"]
    for prompt, actual in zip(PROMPTS, answered["classes"], strict=True):
        expected = model(torch.tensor([prompt]), use_cache=False).logits[0].softmax(-1)
        assert_close(actual, expected, SERVED_TENSOR_FLOAT32, f"{len(prompt)} tokens")


@pytest.mark.only("vllm")
@pytest.mark.parametrize(
    ("asked", "words"),
    [("sleep", "Sleep mode is not supported"), ("return of routed experts", "requires Model Runner V2")],
)
def test_vllm_refuses_on_a_cpu(answered, asked, words):
    assert words in answered[asked]


@pytest.mark.only("sglang")
def test_hidden_states_are_those_of_prompt_and_answer(answered, transformer):
    for ids, states in of_each_prompt(answered, "last hidden states"):
        assert_close(states, last_states(transformer, ids), SERVED_TENSOR_FLOAT32, f"{len(ids)} tokens")


@pytest.mark.only("sglang")
def test_an_unknown_token_to_embed_is_refused_and_the_server_goes_on(answered):
    assert "token ids from 1 to 1000000 found" in answered["unknown token"]
