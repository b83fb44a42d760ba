"""What a user can get wrong: one clear error that names what was found and what to do, before anything is served."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from qnext_plugin.checkpoint.make_quantized import quantize_checkpoint
from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.engines import process
from qnext_plugin.engines.config import mtp_arguments, mtp_flags
from qnext_plugin.engines.server import command
from tests.support.workers import call

SMALL = {"num_hidden_layers": 4, "num_experts": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 24}
MTP = mtp_arguments("vllm", 1)
NGRAM_GPU = {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 3}}
MIXER = "model.layers.0.linear_attn"


def _tensors(change):
    def edit(directory):
        file = directory / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return edit


def _config(**changes):
    def edit(directory):
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def _quantized(change):
    def edit(directory):
        quantize_checkpoint(directory, directory / "quantized", format="fp8-block")
        for file in (directory / "quantized").iterdir():
            file.replace(directory / file.name)
        (directory / "quantized").rmdir()
        change(directory)

    return edit


def _unlike_expert(tensors):
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    del tensors[f"{name}_scale_inv"]
    tensors[name] = tensors[name].bfloat16()


def _without_quantization_config(directory):
    file = directory / "config.json"
    raw = json.loads(file.read_text())
    del raw["quantization_config"]
    file.write_text(json.dumps(raw))


def _remove_expert(tensors):
    for name in [n for n in tensors if ".layers.2.mlp.experts.3." in n]:
        del tensors[name]


def _prune_a_layer(tensors):
    _remove_expert(tensors)
    router = "model.layers.2.mlp.gate.weight"
    tensors[router] = tensors[router][:3].clone()


def _remove_draft(tensors):
    for name in [n for n in tensors if n.startswith("mtp.")]:
        del tensors[name]


def _truncate(directory):
    file = directory / "model.safetensors"
    with file.open("r+b") as f:
        f.truncate(file.stat().st_size // 2)


def _duplicate(directory):
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[19:]}
    for file, held in files.items():
        save_file({n: tensors[n] for n in held}, directory / file, metadata={"format": "pt"})
    weight_map = {n: file for file, held in files.items() for n in held}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


# name: (edit of a good checkpoint, engine arguments, words the error must hold)
CASES = {
    "missing tensor": (_tensors(lambda t: t.pop(f"{MIXER}.A_log")), {}, ["missing", f"{MIXER}.A_log"]),
    "extra tensor": (
        _tensors(lambda t: t.update({f"{MIXER}.surprise": t[f"{MIXER}.A_log"].clone()})),
        {},
        ["unexpected", f"{MIXER}.surprise"],
    ),
    "misshaped tensor": (
        _tensors(lambda t: t.update({f"{MIXER}.in_proj_ba.weight": t[f"{MIXER}.in_proj_ba.weight"][:-1].clone()})),
        {},
        ["wrongly shaped", f"{MIXER}.in_proj_ba.weight", "[7, 96]", "[8, 96]"],
    ),
    "duplicate tensor": (
        _duplicate,
        {},
        ["model-00001-of-00002.safetensors and model-00002", "hold 1 of the same tensors", "delete the files"],
    ),
    "truncated file": (_truncate, {}, ["model.safetensors: truncated", "download it again"]),
    "missing expert": (_tensors(_remove_expert), {}, ["missing", "layers.2.mlp.experts.3."]),
    "too many experts promised": (
        _config(num_experts=5),
        {},
        ["the routers have 4 experts, and config.json says num_experts 5"],
    ),
    "experts pruned unevenly": (
        _tensors(_prune_a_layer),
        {},
        ["the number of experts differs between layers (3 in model.layers.2, 4 in model.layers.0)"],
    ),
    "experts pruned unevenly, as config.json says": (
        _config(per_layer_num_experts=[4, 4, 3, 4]),
        {},
        ["per_layer_num_experts holds 3, expected num_experts 4 in every layer"],
    ),
    "inconsistent heads": (
        _config(linear_num_value_heads=3),
        {},
        ["linear_num_value_heads 3 is not a multiple of linear_num_key_heads 2"],
    ),
    "inconsistent layers": (
        _config(layer_types=["full_attention"] * 3),
        {},
        ["layer_types", "num_hidden_layers"],
    ),
    "draft missing": (
        _tensors(_remove_draft),
        MTP,
        ["drafts are requested, and the checkpoint has no mtp.* tensors"],
    ),
    "draft missing, and denied": (
        lambda directory: (_tensors(_remove_draft)(directory), _config(num_nextn_predict_layers=0)(directory)),
        MTP,
        ["drafts are requested, and the checkpoint has no mtp.* tensors"],
    ),
    "half a draft": (
        _tensors(lambda t: t.pop("mtp.fc.weight")),
        {},
        ["missing", "mtp.fc.weight"],
    ),
    "quantized, scale missing": (
        _quantized(_tensors(lambda t: t.pop(f"{MIXER}.in_proj_qkvz.weight_scale_inv"))),
        {"dtype": "bfloat16"},
        ["incomplete or mixed", "without a scale 1", f"{MIXER}.in_proj_qkvz", "download it again"],
    ),
    "quantized, experts unlike": (
        _quantized(_tensors(_unlike_expert)),
        {"dtype": "bfloat16"},
        ["experts of one layer stored in different ways", "experts.2.down_proj: weight BF16"],
    ),
    "quantized, not said so": (
        _quantized(_without_quantization_config),
        {"dtype": "bfloat16"},
        ["checkpoint is quantized", "weight F8_E4M3", "config.json has no quantization_config"],
    ),
    "quantized, draft missing": (
        _quantized(_tensors(_remove_draft)),
        {"dtype": "bfloat16"} | MTP,
        ["drafts are requested, and the checkpoint has no mtp.* tensors"],
    ),
    **{
        f"plain, to be quantized as {method}": (
            lambda directory: None,
            {"quantization": method, "dtype": "bfloat16"},
            [f"--quantization {method} found, and the checkpoint is not quantized", "drop the flag"],
        )
        for method in ("fp8", "fp8_per_block", "experts_int8", "gptq", "torchao")
    },
    "heads that attention has no kernel for": (
        _config(head_dim=8),
        {},
        ["head_dim is 8, expected one of [32, 64", "serve this checkpoint with SGLang, or on a GPU"],
    ),
    "another kind of speculation": (
        lambda directory: None,
        NGRAM_GPU,
        ["speculative method 'ngram_gpu' found, expected one of mtp, ngram, suffix, eagle3, dflash:"],
    ),
    "another kind of speculation, and no draft": (
        _tensors(_remove_draft),
        NGRAM_GPU,
        ["speculative method 'ngram_gpu' found, expected one of ngram, suffix, eagle3, dflash:"],
    ),
    "drafts accepted that the model would not choose": (
        lambda directory: None,
        {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 2,
                "rejection_sample_method": "synthetic",
                "synthetic_acceptance_length": 2,
            }
        },
        ["rejection_sample_method 'synthetic' found in --speculative-config, expected 'standard'"],
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good") / "checkpoint"
    write_random_checkpoint(directory, dtype="float32", overrides=SMALL)
    return directory


@pytest.fixture(scope="module")
def errors(tmp_path_factory, good, warm):
    root = tmp_path_factory.mktemp("bad")
    spec = {}
    for name, (edit, args, _) in CASES.items():
        directory = root / name.replace(" ", "_")
        shutil.copytree(good, directory)
        edit(directory)
        spec[name] = {"model": str(directory), "args": args}
    with warm.forking():
        return call("vllm_bad_input:errors", root / "worker", cases=spec)


@pytest.mark.parametrize("case", CASES)
def test_engine_does_not_start(errors, case):
    error = errors[case]
    assert error is not None, "the engine started"
    print(error)
    for word in CASES[case][2]:
        assert word in error


@pytest.mark.parametrize(
    ("edit", "options", "words"),
    [
        pytest.param(_truncate, [], "model.safetensors: truncated", id="truncated"),
        pytest.param(
            lambda directory: None,
            ["--tensor-parallel-size", "3"],
            "tensor parallel size 3 does not divide linear_num_key_heads 2; choose one of",
            id="tensor-parallel",
        ),
        pytest.param(
            lambda directory: None,
            ["--pipeline-parallel-size", "2", "--no-enable-prefix-caching", *mtp_flags("vllm", 1)],
            "add --scheduler-cls vllm_ext.scheduler.PipelineDraftScheduler",
            id="pipeline-parallel-mtp",
        ),
    ],
)
def test_server_exits_with_the_reason(tmp_path, warm, edit, options, words):
    directory, log = tmp_path / "checkpoint", tmp_path / "log"
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    write_random_checkpoint(directory, dtype="float32", overrides=SMALL | heads)
    edit(directory)
    options = [*options, "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    with warm.forking():
        assert process.run(command("vllm", str(directory), process.free_port(), options), log) != 0
    text = log.read_text()
    assert words in text, process.tail(log)
    assert "Application startup complete" not in text
