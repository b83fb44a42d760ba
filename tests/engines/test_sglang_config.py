"""SGLang's configuration of a checkpoint with the overrides of the command line, and which drafts it serves."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.checkpoint.stored import read_checkpoint
from qnext_plugin.config import QNextConfig
from tests.support.checkpoints import write_checkpoint
from tests.support.drafts import write_eagle3, write_llama


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_yarn_override_in_either_spelling(tmp_path, key, kind):
    from sglang.srt.utils.hf_transformers.config import get_config

    from sglang_ext.config import qnext_config
    from sglang_ext.register import register_config

    write_random_checkpoint(tmp_path / "model")
    register_config()
    yarn = {kind: "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    config = get_config(str(tmp_path / "model"), trust_remote_code=False, model_override_args={key: yarn})
    rope = qnext_config(config).rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 1024)


def test_a_checkpoint_for_another_program_is_refused_before_sglang_asks_for_its_method(tmp_path):
    from sglang.srt.utils.hf_transformers.config import get_config

    from sglang_ext.register import register_config

    mlx = {"group_size": 64, "bits": 4, "mode": "affine"}
    write_random_checkpoint(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization": mlx, "quantization_config": mlx}))
    register_config()
    with pytest.raises(ValueError, match=r"config\.json: an MLX checkpoint"):
        get_config(str(tmp_path / "model"), trust_remote_code=False)


def spec(algorithm, draft=None, **more):
    """SGLang's options of speculation and of the model, as they are by default."""
    values = {
        "speculative_algorithm": algorithm,
        "speculative_draft_model_path": draft and str(draft),
        "speculative_draft_model_revision": None,
        "speculative_use_rejection_sampling": False,
        "speculative_ngram_max_bfs_breadth": 10,
        "enable_multi_layer_eagle": False,
        "model_path": "model",
        "trust_remote_code": False,
    }
    return SimpleNamespace(**values | more)


@pytest.fixture(scope="module")
def drafts(tmp_path_factory):
    """A checkpoint without a draft, what drafts for it, and what cannot."""
    from sglang_ext.register import register_config

    register_config()
    root = tmp_path_factory.mktemp("drafts")
    target = write_checkpoint(root, "without-draft")
    write_llama(root / "llama", target)
    write_eagle3(root / "eagle3", target)
    other = write_checkpoint(root, "wide-draft")
    write_llama(root / "other-vocabulary", other)
    return root, QNextConfig.from_pretrained(target)


def edited(root, name, **values):
    """A draft whose config.json says something else."""
    directory = root / f"{name}-{'-'.join(values)}"
    shutil.copytree(root / name, directory, dirs_exist_ok=True)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return directory


def drafting(drafts, options, checkpoint="without-draft", **more):
    from sglang_ext import config

    root, dimensions = drafts
    return config.drafting(options, options, read_checkpoint(str(root / checkpoint)), dimensions, **more)


def test_drafts_that_are_served(drafts):
    root, _ = drafts
    for options, name in (
        (spec(None), ""),
        (spec("EAGLE"), "NEXTN"),
        (spec("EAGLE", "model"), "NEXTN"),
        (spec("NGRAM"), "NGRAM"),
        (spec("STANDALONE", root / "llama"), "STANDALONE"),
        (spec("EAGLE3", root / "eagle3"), "EAGLE3"),
    ):
        assert drafting(drafts, options) == name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (lambda root: spec("DSPARK", "x"), "DSPARK found with draft model x, expected NGRAM, STANDALONE with"),
        (lambda root: spec("EAGLE", "x"), "EAGLE found with draft model x, expected NGRAM"),
        (lambda root: spec("EAGLE", enable_multi_layer_eagle=True), "EAGLE found and --enable-multi-layer-eagle"),
        (lambda root: spec("NGRAM", speculative_ngram_max_bfs_breadth=1), "expected 2 or more"),
        (lambda root: spec("STANDALONE"), "STANDALONE found without a model to draft with"),
        (lambda root: spec("STANDALONE", root / "without-draft"), "a qwen3_next, found, expected a draft without"),
        (lambda root: spec("STANDALONE", root / "other-vocabulary"), "which has 331 token ids, expected 320"),
        (lambda root: spec("EAGLE3", root / "llama"), "a LlamaForCausalLM, found, expected the head"),
        (lambda root: spec("EAGLE3", edited(root, "eagle3", target_hidden_size=64)), "hidden size 64, expected 96"),
        (
            lambda root: spec("EAGLE3", edited(root, "eagle3", eagle_config={"eagle_aux_hidden_state_layer_ids": [7]})),
            r"reads the inputs of layers \[8\], expected different ones of layers 1 to 7",
        ),
    ],
)
def test_drafts_that_are_refused(drafts, options, words):
    with pytest.raises(ValueError, match=words):
        drafting(drafts, options(drafts[0]))


def test_a_refusal_names_nextn_only_if_the_checkpoint_has_it(drafts):
    with pytest.raises(ValueError, match="expected NEXTN without a draft model, NGRAM"):
        drafting(drafts, spec("DSPARK"), "wide-draft")


def test_grammars_that_cannot_take_back_a_draft_are_refused_with_drafts():
    from sglang_ext.config import check_grammars

    for backend, drafts in (("outlines", ""), ("llguidance", "NEXTN"), (None, "NGRAM")):
        check_grammars(backend, drafts)
    with pytest.raises(ValueError, match="--grammar-backend outlines found with drafts, expected xgrammar or"):
        check_grammars("outlines", "NGRAM")


def test_other_drafts_are_refused_on_pipelines(drafts):
    assert drafting(drafts, spec("EAGLE"), pp_size=2) == "NEXTN"
    with pytest.raises(ValueError, match="NGRAM found with --pp-size 2, expected 1"):
        drafting(drafts, spec("NGRAM"), pp_size=2)


def test_ngrams_drafts_differ_where_a_tree_is_filled_up():
    """Of equal drafts after one token, a sampler would accept each with the whole probability of the token."""
    from sglang_ext.guards import ngram_drafts

    # A root, the drafts 0 and 3 after it, 0 after the first of them, and two that fill the tree up.
    tokens = np.array([7, 0, 3, 0, 0, 0])
    parents = [None, 0, 0, 1, 0, 0]
    masks = np.eye(6, dtype=np.int64)
    for node, parent in enumerate(parents):
        if parent is not None:
            masks[node] |= masks[parent]
    corpus = SimpleNamespace(draft_token_num=6)
    found, same = ngram_drafts(lambda corpus: (tokens, masks.flatten()), corpus)
    assert found.tolist() == [7, 0, 3, 0, 1, 2]
    assert same.reshape(6, 6).tolist() == masks.tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, None),
        ({"mamba_track_interval": 128, "page_size": 64, "speculative_num_draft_tokens": 4}, None),
        ({"mamba_radix_cache_strategy": "extra_buffer_lazy"}, None),
        ({"mamba_radix_cache_strategy": "no_buffer", "mamba_track_interval": 2}, None),
        ({"mamba_radix_cache_strategy": "no_buffer", "page_size": 16}, "--page-size 16 found with"),
        ({"mamba_track_interval": 100, "page_size": 16}, "expected a multiple of the page size 16"),
        ({"mamba_track_interval": 4, "speculative_num_draft_tokens": 8}, "at least the 8 draft tokens"),
        (
            {"mamba_radix_cache_strategy": "extra_buffer_lazy", "speculative_algorithm": "EAGLE"},
            "extra_buffer_lazy found, expected extra_buffer",
        ),
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache found, expected none on a CPU"),
    ],
)
def test_prefix_cache_with_which_sglang_would_end_on_a_cpu(options, words):
    from sglang_ext.cpu.platform import check_prefix_cache

    default = {
        "enable_hierarchical_cache": False,
        "disable_radix_cache": False,
        "disable_overlap_schedule": False,
        "mamba_radix_cache_strategy": "auto",
        "speculative_algorithm": None,
        "speculative_num_draft_tokens": None,
        "mamba_track_interval": 256,
        "page_size": None,
    }
    with nullcontext() if words is None else pytest.raises(ValueError, match=words):
        check_prefix_cache(SimpleNamespace(**default | options))


def test_a_request_has_room_for_all_slots_that_ngram_takes_after_its_last_token(monkeypatch):
    """SGLang's own row is shorter: at the end of the context it would write to another request's."""
    from sglang.srt.mem_cache import allocation_sizing

    from sglang_ext.guards import extra_context_len

    spec = SimpleNamespace(
        speculative_algorithm="NGRAM",
        speculative_num_steps=1,
        speculative_eagle_topk=10,
        speculative_num_draft_tokens=12,
        speculative_adaptive=False,
    )
    monkeypatch.setattr(allocation_sizing, "get_spec", lambda: spec)
    monkeypatch.setattr(allocation_sizing, "get_alloc_page_size", lambda: 1)
    monkeypatch.setattr(allocation_sizing, "max_speculative_num_draft_tokens", lambda: 12)
    sglangs = allocation_sizing.get_req_to_token_extra_context_len
    reserve = allocation_sizing.get_alloc_reserve_per_decode()
    assert sglangs() < reserve <= extra_context_len(sglangs)
