"""SGLang's configuration of a checkpoint, with the overrides of the command line."""

import json

import pytest

from qnext_plugin.checkpoint.make_random import write_random_checkpoint


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
