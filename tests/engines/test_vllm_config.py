"""vLLM's configuration of a checkpoint, with the overrides of the command line."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.checkpoint.stored import Checkpoint
from qnext_plugin.config import QNextConfig


def read(directory, overrides, **changes):
    """The configuration as vLLM reads it: from config.json with ``changes``, then ``overrides``."""
    from transformers import AutoConfig
    from vllm.config import ModelConfig

    from vllm_ext.register import register

    write_random_checkpoint(directory)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    register()
    config = AutoConfig.from_pretrained(directory)
    ModelConfig._apply_dict_overrides(None, config, overrides)
    return config


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_yarn_override_in_either_spelling(tmp_path, key, kind):
    yarn = {kind: "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    config = read(tmp_path / "model", {key: yarn}, rope_theta=5_000_000)
    rope = QNextConfig.from_dict(config.to_dict()).rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 1024)
    assert (rope["rope_theta"], rope["partial_rotary_factor"]) == (5_000_000, 0.25)
    assert config.rope_parameters["rope_type"] == "yarn"  # vLLM reads it


def test_null_is_the_default_and_no_draft_layers_are_none_named(tmp_path):
    config = read(tmp_path / "model", {}, decoder_sparse_step=None, mlp_only_layers=None, num_nextn_predict_layers=0)
    assert (config.decoder_sparse_step, getattr(config, "num_nextn_predict_layers", None)) == (1, None)
    assert QNextConfig.from_dict(config.to_dict()) == QNextConfig.from_pretrained(tmp_path / "model")


def test_a_plain_checkpoint_is_quantized_by_vllms_own_configuration(tmp_path):
    from vllm_ext.quantization import layer_quantization

    write_random_checkpoint(tmp_path / "model")
    config, online = QNextConfig.from_pretrained(tmp_path / "model"), SimpleNamespace()
    found = layer_quantization(Checkpoint({}, {}, None), config.draft, SimpleNamespace(quant_config=online))
    assert found is online


@pytest.mark.parametrize(
    ("method", "amx", "words"),
    [
        ("int8_per_channel_weight_only", True, None),
        ("int8_per_channel_weight_only", False, "none is possible on this CPU"),
        ("fp8", True, "vLLM has a kernel for int8_per_channel_weight_only alone on this CPU"),
    ],
)
def test_weights_are_quantized_while_loading_where_vllm_can(monkeypatch, method, amx, words):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    from vllm_ext.config import CheckedConfig

    plain = SimpleNamespace(quantization=method, model_arch_config=SimpleNamespace(quantization_config=None))
    with nullcontext() if words is None else pytest.raises(ValueError, match=words):
        CheckedConfig.verify_and_update_model_config(plain)


@pytest.mark.parametrize(("second", "stages", "refused"), [(True, 1, False), (True, 2, True), (False, 2, False)])
def test_second_runner_serves_on_a_cpu_but_for_pipeline_parallelism(second, stages, refused):
    from vllm_ext.config import check_runner

    config = SimpleNamespace(use_v2_model_runner=second, parallel_config=SimpleNamespace(pipeline_parallel_size=stages))
    with pytest.raises(ValueError, match="set VLLM_USE_V2_MODEL_RUNNER=0") if refused else nullcontext():
        check_runner(config)


@pytest.mark.parametrize(("space", "asked", "noted"), [("2", 1 << 30, True), ("1", 1 << 30, False), ("", 1, False)])
def test_cache_memory_of_the_environment_is_noted_where_a_flag_says_otherwise(monkeypatch, space, asked, noted):
    from vllm_ext.config import cache_memory_note

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space)
    assert bool(cache_memory_note(asked)) == noted
    assert cache_memory_note(None) is None
