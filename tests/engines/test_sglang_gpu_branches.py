"""Which branch our SGLang layers take on a GPU, shown without one."""

import glob
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qnext_plugin.checkpoint.headers import TensorInfo
from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.checkpoint.stored import Checkpoint
from qnext_plugin.config import QNextConfig
from tests.support.workers import call


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny") / "model"
    write_random_checkpoint(directory)
    return QNextConfig.from_pretrained(directory)


def pretend(monkeypatch, module, *, is_cuda):
    """Build the layers of ``module`` from stand-ins, on what says it is a GPU."""
    from torch import nn

    names = [name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, nn.Module)]
    own = {"MLP", "GatedAttention", "SparseMoeBlock"}
    for name in {
        *names,
        "get_rope",
        "build",
        "get_parallel",
        "get_moe_impl_class",
        "get_exec",
        "TopK",
        "bind_topk",
    } - own:
        monkeypatch.setattr(module, name, MagicMock(), raising=False)
    monkeypatch.setattr(module, "is_cuda", lambda: is_cuda)


@pytest.mark.parametrize(
    ("is_cuda", "trainer", "fused"), [(True, None, True), (True, "fsdp", False), (False, None, False)]
)
def test_fused_attention_prologue_is_not_for_trainers(monkeypatch, config, is_cuda, trainer, fused):
    from sglang_ext import gated_attention

    pretend(monkeypatch, gated_attention, is_cuda=is_cuda)
    gated_attention.get_parallel.return_value.attn_tp_size = 1
    gated_attention.get_exec.return_value.deterministic.rl_on_policy_target = trainer
    assert gated_attention.GatedAttention(config, 0, None, "layer").fused == fused


def test_float32_is_refused_on_a_gpu(monkeypatch):
    from sglang_ext import config

    config.check_dtype(torch.float32)
    monkeypatch.setattr(config, "ON_CPU", False)
    config.check_dtype(torch.bfloat16)
    with pytest.raises(ValueError, match="--dtype float32 found, expected bfloat16 or float16"):
        config.check_dtype(torch.float32)


def sparse_block(monkeypatch, config, *, backend="none", pages=False, scattered=False, **replaced):
    """Build our block of experts from stand-ins, as on a GPU whose second stream is called so."""
    from sglang.srt.layers.moe.utils import MoeA2ABackend

    from sglang_ext import sparse_moe

    pretend(monkeypatch, sparse_moe, is_cuda=True)
    sparse_moe.get_parallel.return_value.tp_size = 1
    sparse_moe.get_exec.return_value.moe.ep_num_redundant_experts = 0
    replaced |= {
        "get_moe_a2a_backend": lambda: MoeA2ABackend(backend),
        "is_deepep_class_backend": lambda: backend == "deepep",
        "pages_experts": lambda: pages,
        "second_stream": lambda: "second",
        "is_moe_input_scattered_across_dp_ranks": lambda: scattered,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(sparse_moe, name, value)
    return sparse_moe.SparseMoeBlock(config, 0, None, "layer")


@pytest.mark.parametrize("scattered", [False, True])
def test_shared_expert_is_whole_where_ranks_route_their_own_tokens(monkeypatch, config, scattered):
    made = MagicMock()
    sparse_block(monkeypatch, config, scattered=scattered, MLP=made)
    assert made.call_args.kwargs["replicated"] == scattered


@pytest.mark.parametrize(
    ("backend", "pages", "stream"),
    [("none", False, "second"), ("flashinfer", False, "second"), ("deepep", False, None), ("none", True, None)],
)
def test_experts_run_beside_the_shared_one(monkeypatch, config, backend, pages, stream):
    """But not while they exchange tokens by DeepEP or come from the host."""
    assert sparse_block(monkeypatch, config, backend=backend, pages=pages).stream == stream


def test_megamoe_is_refused(monkeypatch, config):
    with pytest.raises(ValueError, match="--moe-a2a-backend megamoe found, expected another one"):
        sparse_block(monkeypatch, config, backend="megamoe")


class Copies(TorchDispatchMode):
    """Counts what a GPU would launch to copy."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += func.overloadpacket.__name__ in ("clone", "copy_", "_to_copy", "cat", "contiguous")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def delta_net(monkeypatch):
    """A layer as on a GPU, over stand-ins that record what they are given."""
    from sglang_ext import gated_delta_net

    monkeypatch.setattr(gated_delta_net, "ON_CPU", False)
    layer = object.__new__(gated_delta_net.GatedDeltaNet)
    torch.nn.Module.__init__(layer)
    dims = SimpleNamespace(conv_dim=16, value_dim=8, num_v_heads=4, head_v_dim=2)
    qkvz, ba = torch.randn(6, dims.conv_dim + dims.value_dim), torch.randn(6, 2 * dims.num_v_heads)
    layer.dims, layer.stream, layer.unpacks_in_decode = dims, None, False
    layer.in_proj_qkvz, layer.in_proj_ba = lambda x: (qkvz[: len(x)], None), lambda x: (ba[: len(x)], None)
    layer.norm, layer.out_proj = torch.mul, lambda x: (x, None)
    given = {}

    def attn(forward_batch, qkv, a, b):
        given.update(qkv=qkv, a=a, b=b)
        return torch.ones(1, len(qkv), dims.num_v_heads, dims.head_v_dim)

    layer.attn = attn
    return SimpleNamespace(layer=layer, given=given, qkvz=qkvz, ba=ba)


MODES = {
    "prompts": ("EXTEND", "EXTEND", False, 0),
    "prompts and decode steps": ("MIXED", "MIXED", False, 0),
    "prompts on 0.5.22": ("EXTEND", None, False, 0),
    "decode steps labeled as prompts": ("EXTEND", "DECODE", False, 1),
    "drafts for Triton": ("TARGET_VERIFY", "TARGET_VERIFY", True, 0),
    "drafts for Triton on 0.5.22": ("TARGET_VERIFY", None, True, 0),
    "drafts for FlashInfer": ("TARGET_VERIFY", "TARGET_VERIFY", False, 1),
    "decode steps without the fused kernel": ("DECODE", "DECODE", False, 1),
}


@pytest.mark.parametrize(("mode", "logical", "strided", "copies"), MODES.values(), ids=MODES)
def test_projections_reach_the_kernels_as_views(monkeypatch, delta_net, mode, logical, strided, copies):
    from sglang.srt.model_executor import forward_context
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    kernels = SimpleNamespace(_use_strided_target_verify_qkv=strided)
    monkeypatch.setattr(forward_context, "get_attn_backend", lambda: SimpleNamespace(linear_attn_backend=kernels))
    batch = SimpleNamespace(forward_mode=ForwardMode[mode])
    if logical:
        batch.logical_forward_mode = ForwardMode[logical]
    with Copies() as counted:
        out = delta_net.layer(torch.zeros(6, 3), batch)
    assert counted.found == copies
    dims, given = delta_net.layer.dims, delta_net.given
    assert given["qkv"].data_ptr() == delta_net.qkvz.data_ptr()
    assert given["a"].is_contiguous() == given["b"].is_contiguous() == bool(copies)
    torch.testing.assert_close(torch.cat([given["b"], given["a"]], dim=1), delta_net.ba, rtol=0, atol=0)
    torch.testing.assert_close(out, delta_net.qkvz[:, dims.conv_dim :], rtol=0, atol=0)


def test_views_give_what_copies_give(tmp_path):
    """In Triton's interpreter, bit for bit."""
    found = call("sglang_gpu:views", tmp_path / "worker", env={"TRITON_INTERPRET": "1"})
    assert found == {"convolution": 0, "delta rule": 0}


@pytest.mark.parametrize("draft", [False, True])
def test_experts_are_found_where_the_load_balancer_has_put_them(monkeypatch, draft):
    """On SGLang 0.5.22, which asks the model; from 0.5.23 on its router knows."""
    from sglang.srt.eplb import expert_location_dispatch

    from sglang_ext import compat

    monkeypatch.setattr(compat, "ON_CPU", False)
    info = SimpleNamespace(init_new=lambda layer_id: f"places of layer {layer_id}")
    monkeypatch.setattr(expert_location_dispatch, "ExpertLocationDispatchInfo", info)
    batch = SimpleNamespace(moe_num_token_non_padded=lambda: 5)

    def old(hidden_states, router_logits, *, num_token_non_padded=None, expert_location_dispatch_info=None):
        return num_token_non_padded, expert_location_dispatch_info

    old.layer_id = 3
    assert compat.route(old, None, None, batch, draft) == (5, None if draft else "places of layer 3")
    new = MagicMock(spec=["bind_runner_backend", "__call__"])
    assert compat.route(new, "rows", "logits", batch, draft) == new.return_value
    new.assert_called_once_with("rows", "logits")


def test_projection_of_a_plain_draft_is_not_quantized_while_loading():
    from sglang_ext.quantization import quantization_of_projection

    asked = object()
    plain, quantized = Checkpoint({}, {}, None), Checkpoint({}, {}, {"quant_method": "fp8"})
    assert quantization_of_projection(plain, asked) is None
    assert quantization_of_projection(quantized, asked) is asked
    assert quantization_of_projection(Checkpoint({}, None, None), asked) is asked  # nothing is known of it


NUMBERED = "model-000{}-of-00041.safetensors"


@pytest.mark.parametrize(
    ("files", "pattern"),
    [
        (["model.safetensors"], "model.safetensors"),
        ([NUMBERED.format(9), NUMBERED.format(8)], NUMBERED.format("[89]")),
        (["a[1].safetensors"], "a[[]1].safetensors"),
        (["mtp.safetensors", "model.safetensors"], None),
        ([], None),
    ],
)
def test_a_draft_reads_the_files_that_hold_it(tmp_path, files, pattern):
    from sglang.srt.model_loader.weight_utils import filter_duplicate_safetensors_files

    from sglang_ext.loading import pattern_of

    for file in [*files, NUMBERED.format(1)]:
        (tmp_path / file).touch()
    headers = {f"mtp.{i}": TensorInfo((), "BF16", tmp_path / file) for i, file in enumerate(files)}
    headers["model.norm.weight"] = TensorInfo((), "BF16", tmp_path / NUMBERED.format(1))
    found = pattern_of(Checkpoint({}, headers, None), "mtp.")
    assert found == (None if pattern is None else [pattern])
    if found:
        read = glob.glob(str(tmp_path / found[0]))
        read = filter_duplicate_safetensors_files(read, str(tmp_path), "no index", allow_patterns=found)
        assert sorted(Path(file).name for file in read) == sorted(files)


GPUS = [
    ({"capability": (9, 0), "flags": []}, ["flashinfer", "triton", "triton"]),
    ({"capability": (8, 0), "flags": []}, ["triton", "triton", "triton"]),
    ({"capability": (10, 0), "flags": []}, ["triton", "triton", "triton"]),
    ({"capability": (10, 0), "flags": ["--mamba-ssm-dtype", "bfloat16"]}, ["flashinfer", "triton", "triton"]),
    ({"capability": (9, 0), "flags": ["--chunked-prefill-size", "65536"]}, ["triton", "triton", "triton"]),
    ({"capability": (9, 0), "flags": ["--linear-attn-prefill-backend", "triton"]}, ["triton", "triton", "triton"]),
]


def test_doctor_names_the_kernels_that_sglang_takes_on_a_gpu(tmp_path, warm):
    """By SGLang's own functions, of a model with the heads of the 80B."""
    heads = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    write_random_checkpoint(tmp_path / "model", overrides=heads)
    cases = [case for case, _ in GPUS]
    with warm.forking():
        found = call("sglang_gpu:backends", tmp_path / "worker", model=str(tmp_path / "model"), cases=cases)
    assert found == [expected for _, expected in GPUS]
