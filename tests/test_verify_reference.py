"""The streamed reference is the whole one, keeps little in memory, and what was recorded is not computed again."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.verify import reference as module
from qnext_plugin.verify.reference import Recorded, Streamed, Whole
from qnext_plugin.verify.rows import Query
from qnext_plugin.verify.scenarios import tokens
from tests.support import directories
from tests.support.checkpoints import CHECKPOINTS, write_checkpoint
from tests.support.quantized import FORMS, dequantized, write
from tests.support.tolerances import STREAMED_LOGPROB

QUERIES = [Query((*tokens(1, 1), 7), 1), Query(tokens(90, 2), 89), Query(tokens(35, 3), 5)]


@pytest.mark.parametrize("name", ["odd-a", "odd-b", "odd-c"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_is_whole(tmp_path, name, dtype):
    """Irregular and dense layers, tied head, biases, YaRN, both dialects."""
    checkpoint = write_checkpoint(tmp_path, name)
    for streamed, whole in zip(Streamed(checkpoint, dtype)(QUERIES), Whole(checkpoint, dtype)(QUERIES), strict=True):
        if dtype == torch.float32:
            assert torch.equal(streamed.ids, whole.ids)
            assert (streamed.logprobs - whole.logprobs).abs().max() < STREAMED_LOGPROB
            assert (streamed.margin - whole.margin).abs().max() < 1e-5
        else:
            assert (streamed.logprobs - whole.logprobs).abs().mean() < 0.03


def test_streamed_reads_fused_experts(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "odd-d")
    expected = Streamed(checkpoint)(QUERIES)
    tensors = load_file(checkpoint / "model.safetensors")
    for prefix in {name.partition(".experts.")[0] + ".experts." for name in tensors if ".experts." in name}:
        parts = [{p: tensors.pop(f"{prefix}{e}.{p}_proj.weight") for p in ("gate", "up", "down")} for e in range(8)]
        tensors[prefix + "gate_up_proj"] = torch.stack([torch.cat([part["gate"], part["up"]]) for part in parts])
        tensors[prefix + "down_proj"] = torch.stack([part["down"] for part in parts])
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    for a, b in zip(Streamed(checkpoint)(QUERIES), expected, strict=True):
        assert torch.equal(a.logprobs, b.logprobs)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    write(root)
    return root


@pytest.mark.parametrize("form", FORMS)
def test_quantized_weights_are_those_of_their_dequantized_twin(quantized, form):
    """By another library's decoders; one form stores a shared expert fused."""
    twin = dequantized(quantized, form)
    for streamed, whole in zip(module.reference(quantized / form)(QUERIES), Whole(twin)(QUERIES), strict=True):
        closest = whole.closest(streamed.ids, streamed.logprobs)
        assert (streamed.logprobs - closest).abs().max() < STREAMED_LOGPROB


def test_files_that_transformers_does_not_find_are_streamed(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "odd-d")
    shards = directories.write(checkpoint, tmp_path / "shards", directories.WITH_DRAFT["shards without an index"])
    for a, b in zip(module.reference(shards)(QUERIES), Streamed(checkpoint)(QUERIES), strict=True):
        assert torch.equal(a.logprobs, b.logprobs)


def test_tensor_that_transformers_needs_is_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "odd-d")
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.linear_attn.in_proj_ba.weight"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no model\.layers\.1\.linear_attn\.in_proj_ba\.weight"):
        Streamed(checkpoint)(QUERIES)


PEAK = """
import sys, torch
from pathlib import Path
from qnext_plugin.verify.reference import Streamed
from qnext_plugin.verify.rows import Query

def status(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024

torch.set_num_threads(1)
before = status("VmRSS")
Streamed(Path(sys.argv[1]))([Query(tuple(range(32)), 4)])
print(status("VmHWM") - before)
"""


def test_streamed_never_holds_the_experts_of_a_layer(tmp_path):
    """File pages that are only mapped count as well."""
    wide = {"num_hidden_layers": 2, "num_experts": 64, "hidden_size": 256, "moe_intermediate_size": 512}
    wide["layer_types"] = ["linear_attention", "full_attention"]
    write_random_checkpoint(tmp_path / "wide", dtype="bfloat16", overrides=wide)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "wide")]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    experts = 64 * 3 * 512 * 256 * torch.float32.itemsize
    print(f"{peak / 2**20:.0f} MiB at most, {experts / 2**20:.0f} MiB of experts a layer")
    assert peak < experts / 2


def test_recorded_rows_are_not_computed_again(tmp_path, monkeypatch):
    checkpoint, file = write_checkpoint(tmp_path, "odd-d"), tmp_path / "reference"
    expected = Recorded(checkpoint, file).of(torch.float32)(QUERIES[:2])
    asked = []

    def noted(checkpoint, dtype):
        return lambda queries: asked.append((dtype, list(queries))) or Whole(checkpoint, dtype)(queries)

    monkeypatch.setattr(module, "reference", noted)
    again = Recorded(checkpoint, file).of(torch.float32)
    for a, b in zip(again(QUERIES[:2]), expected, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "logprobs", "margin"))
    # A part of what is known, one token more, and another dtype.
    shorter, longer = Query(QUERIES[1].ids[:-3], 20), Query((*QUERIES[1].ids, 5), 4)
    again([shorter])
    assert not asked
    again([QUERIES[0], longer])
    Recorded(checkpoint, file).of(torch.bfloat16)(QUERIES[:1])
    assert asked == [(torch.float32, [longer]), (torch.bfloat16, QUERIES[:1])]


def test_record_of_another_checkpoint_is_refused(tmp_path):
    Recorded(write_checkpoint(tmp_path, "odd-d"), tmp_path / "reference").of(torch.float32)(QUERIES[:1])
    other = write_checkpoint(tmp_path, "odd-b")
    with pytest.raises(ValueError, match=r"reference: holds the reference of .* use another file"):
        Recorded(other, tmp_path / "reference")


def test_every_checkpoint_has_its_own_fingerprint(tmp_path):
    names = ["odd-b", "odd-d"]
    assert set(names) < set(CHECKPOINTS)
    assert len({module.fingerprint(write_checkpoint(tmp_path, name)) for name in names}) == 2
