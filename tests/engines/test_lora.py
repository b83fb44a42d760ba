"""LoRA adapters served several at a time, against `transformers` with each merged into the weights.

With MTP on two ranks: the draft is the base's, and what is accepted is what the adapted model would say. And alone.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import httpx
import pytest
import torch
from safetensors.torch import load_file

from qnext_plugin.checkpoint.layouts import KINDS, ungroup
from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.config import QNextConfig
from qnext_plugin.engines.config import mtp_arguments
from qnext_plugin.verify.reference import Whole
from qnext_plugin.verify.rows import Query
from qnext_plugin.verify.scenarios import tokens
from tests.support.adapters import PREFIX, WEIGHTS, save, write_adapter, write_merged
from tests.support.installed import ENGINE
from tests.support.references import TOLERANCE
from tests.support.serving import EXACT, MTP, NAME, serving

# Every expert is used: between two that tie, rounding decides in any implementation.
SIZES = {
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "mlp_only_layers": [1],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 12,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "max_position_embeddings": 512,
}
FLAGS = {
    "vllm": [
        *("--max-model-len", "512", "--enforce-eager", "--block-size", "32"),
        *("--num-gpu-blocks-override", "64", "--max-num-seqs", "8"),
        *("--max-num-batched-tokens", "64", "--enable-lora", "--max-loras", "2", "--max-cpu-loras", "3"),
        *("--max-lora-rank", "8", *EXACT),
    ],
    "sglang": [
        *("--context-length", "512", "--max-total-tokens", "4096", "--max-running-requests", "8"),
        *("--max-mamba-cache-size", "40", "--chunked-prefill-size", "64"),
        *("--max-loras-per-batch", "3", "--max-lora-rank", "8", *EXACT),
    ],
}[ENGINE]
ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}
LOCAL_ARGMAX = {"use_local_argmax_reduction": True}
WITH_MTP_ON_TWO_RANKS = {
    "vllm": [
        *("--speculative-config", json.dumps(mtp_arguments("vllm", 2)["speculative_config"] | LOCAL_ARGMAX)),
        *("--tensor-parallel-size", "2"),
    ],
    "sglang": [*MTP["sglang"], "--tp-size", "2"],
}[ENGINE]
PATHS = {"vllm": "--lora-modules", "sglang": "--lora-paths"}[ENGINE]
ROUTES = {"vllm": "/v1/", "sglang": "/"}[ENGINE]
LINEAR, ATTENTION = r".*\.linear_attn\.(in_proj_\w+|out_proj)", r".*\.self_attn\.\w_proj"
# name: module pattern, rank, alpha, further keys
ADAPTERS = {
    # What `all-linear` is where experts are modules of their own, less those.
    "everything": (
        rf"model\.({LINEAR}|{ATTENTION}|.*\.(mlp|shared_expert)\.\w+)",
        5,
        7,
        {"vllm": {}, "sglang": {"target_modules": "all-linear"}}[ENGINE],  # SGLang has its own view of these
    ),
    # Of the draft as well, where the server has none to apply it to.
    "mixers": (
        rf"(model|mtp)\.({LINEAR}|{ATTENTION})",
        3,
        4,
        {"vllm": {"rank_pattern": {"in_proj_ba": 7, "v_proj": 1}}, "sglang": {}}[ENGINE],  # SGLang has one rank for all
    ),
    "parts": (r"model\.layers\.(0\.linear_attn\.in_proj_qkvz|3\.self_attn\.k_proj)", 1, 2, {"use_rslora": True}),
}
# How a request names an adapter, or none.
NAMED = {
    "vllm": lambda name: {"model": name},
    "sglang": lambda name: {"lora_path": None if name == NAME else name},
}[ENGINE]
PROMPTS = [tokens(length, seed=length) for length in (1, 40, 150)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    write_random_checkpoint(root / "base", dtype="float32", overrides=SIZES)
    for seed, (name, (modules, rank, alpha, more)) in enumerate(ADAPTERS.items()):
        write_adapter(root / name, root / "base", modules, rank, alpha, seed, **more)
    return root


@pytest.fixture(scope="module")
def reference(root):
    """``transformers`` with an adapter merged, by its directory's name."""

    @cache
    def of(name):
        return Whole(
            root / "base" if name == NAME else write_merged(root / f"{name}-merged", root / "base", root / name)
        )

    return of


@pytest.fixture(scope="module", params=["drafts", pytest.param("alone", marks=pytest.mark.exhaustive)])
def server(root, request):
    drafts, log = request.param == "drafts", root / f"{request.param}.log"
    flags = [*FLAGS, *(WITH_MTP_ON_TWO_RANKS if drafts else []), PATHS, f"everything={root / 'everything'}"]
    with serving(ENGINE, root / "base", flags, log, ENVIRONMENT) as server:
        assert (f"is served by {ENGINE}_ext.mtp" in log.read_text()) == drafts
        yield server


def post(server, prompt, name):
    request = server.request(prompt, 16, 0.0, **NAMED(name))
    return httpx.post(f"{server.url}{request['url']}", json=request["json"], timeout=300)


def ask(server, names, prompts=PROMPTS):
    """Answers to ``prompts`` by the model with each adapter, all at once: (adapter, prompt, answer)."""
    pairs = [(name, prompt) for prompt in prompts for name in names]
    with ThreadPoolExecutor(len(pairs)) as pool:
        answers = list(pool.map(lambda pair: server.parse(post(server, pair[1], pair[0])), pairs))
    return [(*pair, answer) for pair, answer in zip(pairs, answers, strict=True)]


def off(answered, reference):
    """The largest difference of chosen tokens' log-probabilities from those of each answer's own reference."""
    worst = 0.0
    for model, prompt, answer in answered:
        (rows,) = reference(model)([Query((*prompt, *answer.token_ids), len(answer.token_ids))])
        exact = rows.gather(torch.tensor(answer.token_ids)[:, None])[:, 0]
        difference = float((torch.tensor(answer.logprobs) - exact).abs().max())
        print(f"{model}, {len(prompt)} tokens: {difference:.3g}")
        worst = max(worst, difference)
    return worst


def load(server, name, path, **more):
    body = {"lora_name": name, "lora_path": str(path)} | more
    return httpx.post(f"{server.url}{ROUTES}load_lora_adapter", json=body, timeout=300)


def unload(server, name):
    return httpx.post(f"{server.url}{ROUTES}unload_lora_adapter", json={"lora_name": name}, timeout=300)


@pytest.fixture
def all_loaded(server, root):
    for name in ("mixers", "parts"):
        assert load(server, name, root / name).status_code == 200
    yield
    for name in ("mixers", "parts"):
        assert unload(server, name).status_code == 200


def test_each_request_of_a_batch_is_answered_with_its_adapter(server, all_loaded, reference):
    """Also from the prefix cache, which must keep adapters apart."""
    for _ in range(2):
        assert off(ask(server, ["m", *ADAPTERS]), reference) < TOLERANCE


@pytest.mark.exhaustive
def test_the_adapters_do_something_and_their_rows_order_matters(root, reference):
    config = QNextConfig.from_pretrained(root / "base")
    tensors, flat = load_file(root / "everything" / WEIGHTS), {}
    for name, tensor in tensors.items():
        kind = KINDS.get(name.split(".")[-3]) if "lora_B" in name else None
        flat[name] = ungroup(tensor, config.gdn, kind, "lora_B.weight") if kind else tensor
    save(root / "flat", flat, json.loads((root / "everything" / "adapter_config.json").read_text()))
    query = [Query(PROMPTS[1], 20)]
    right, *wrong = (reference(name)(query)[0].logprobs for name in ("everything", "flat", "m", "mixers"))
    for logprobs in wrong:
        assert (right - logprobs).abs().max() > 1000 * TOLERANCE


@pytest.fixture(scope="module")
def passed(server, root, reference):
    """An adapter that came, served beside another and went."""
    passing = root / "passing"
    if not passing.exists():
        write_adapter(passing, root / "base", rf"model\.{ATTENTION}", 2, 5, seed=7)
    assert missing(server, "passing")
    assert load(server, "passing", passing).status_code == 200
    assert off(ask(server, ["passing", "everything"]), reference) < TOLERANCE
    assert unload(server, "passing").status_code == 200


def missing(server, name):
    return post(server, PROMPTS[0], name).status_code in (400, 404)


@pytest.mark.exhaustive
def test_an_adapter_comes_and_goes_while_others_serve(server, passed, reference):
    assert off(ask(server, ["everything", "m"]), reference) < TOLERANCE


@pytest.mark.exhaustive
@pytest.mark.only("vllm")
def test_an_adapter_that_went_is_missing(server, passed):
    assert missing(server, "passing")


@pytest.mark.exhaustive
@pytest.mark.only("sglang")
def test_an_adapter_that_went_is_read_again_when_a_request_names_it(server, passed, reference):
    assert off(ask(server, ["passing", "everything"], PROMPTS[:2]), reference) < TOLERANCE
    assert unload(server, "passing").status_code == 200


def test_more_adapters_than_are_kept_are_read_again(server, root, reference):
    extra = ["mixers", "parts", "third"]
    if not (root / "third").exists():
        write_adapter(root / "third", root / "base", rf"model\.{LINEAR}", 8, 3, seed=9)
    for name in extra:
        assert load(server, name, root / name).status_code == 200
    for _ in range(2):
        for name in ["everything", *extra]:
            assert off(ask(server, [name], PROMPTS[:2]), reference) < TOLERANCE
    for name in extra:
        assert unload(server, name).status_code == 200


def another_base(directory, root):
    smaller = directory.with_name("smaller")
    write_random_checkpoint(smaller, dtype="float32", overrides=SIZES | {"hidden_size": 64})
    write_adapter(directory, smaller, rf"model\.{LINEAR}", 3, 3)


def more_layers(directory, root):
    longer = directory.with_name("longer")
    write_random_checkpoint(longer, dtype="float32", overrides=SIZES | {"num_hidden_layers": 8})
    write_adapter(directory, longer, rf"model\.{LINEAR}", 3, 3)


def fused_experts(directory, root):
    """As PEFT adapts the fused tensors of `transformers`."""
    a, b, prefix = torch.zeros(12, 96), torch.zeros(128, 12), f"{PREFIX}model.layers.0.mlp.experts"
    both = {f"{prefix}.base_layer.lora_A.weight": a, f"{prefix}.base_layer.lora_B.weight": b}
    down = {f"{prefix}.lora_A.weight": torch.zeros(12, 64), f"{prefix}.lora_B.weight": torch.zeros(96, 12)}
    save(directory, both | down, {"r": 3, "lora_alpha": 3, "target_modules": [], "target_parameters": ["down_proj"]})


def half(directory, root):
    shutil.copytree(root / "parts", directory)
    tensors = load_file(directory / WEIGHTS)
    del tensors[f"{PREFIX}model.layers.0.linear_attn.in_proj_qkvz.lora_B.weight"]
    shutil.rmtree(directory)
    save(directory, tensors, {"r": 1, "lora_alpha": 1, "target_modules": ["in_proj_qkvz"]})


def another_rank(directory, root):
    shutil.copytree(root / "parts", directory)
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 2}))


def heads(directory, root):
    write_adapter(directory, root / "base", r"model\.embed_tokens|lm_head", 3, 3)


def experts(directory, root):
    write_adapter(directory, root / "base", r"model\..*experts\.\d+\..*", 3, 3)


# What has a loaded adapter replaced, where the engine can.
IN_PLACE = {"vllm": {"load_inplace": True}, "sglang": {}}[ENGINE]
REFUSED = {
    "another base": (another_base, ["does not fit this model", "wrongly shaped", "in_proj_qkvz", "trained on"]),
    "more layers": (more_layers, ["not in this model", "model.layers.{4..6}.linear_attn.in_proj_qkvz"]),
    "experts": (experts, ["cannot adapt here", "experts.{0..3}.down_proj", "merge it into the weights"]),
    "fused experts": (fused_experts, ["cannot adapt here", "layers.0.mlp.experts", "merge it into the weights"]),
    "half": (half, ["missing", "model.layers.0.linear_attn.in_proj_qkvz.lora_B"]),
    "another rank": (another_rank, ["has rank 1", "2 in adapter_config.json"]),
    "embedding and head": (heads, ["target modules", *{"vllm": ["lm_head"], "sglang": []}[ENGINE]]),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_does_not_fit_is_refused_and_the_server_goes_on(server, root, reference, tmp_path, case):
    write, words = REFUSED[case]
    directory = tmp_path / case.replace(" ", "_")
    write(directory, root)
    answer = load(server, "unfit", directory)
    print(answer.text)
    assert answer.status_code >= 400
    for word in words:
        assert word in answer.text
    if IN_PLACE:
        assert load(server, "everything", directory, **IN_PLACE).status_code >= 400
    assert off(ask(server, ["everything", "m"], PROMPTS[:2]), reference) < TOLERANCE
