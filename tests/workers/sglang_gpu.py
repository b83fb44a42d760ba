"""SGLang's kernels in Triton's interpreter, which has to be turned on before they are imported."""

import inspect
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

H, HV, K, V, WIDTH = 2, 4, 16, 16, 4
SLOTS = 6


def views() -> dict[str, float]:
    """Return how far results of our views of the projections differ from those of copies, by what is computed."""
    from sglang.kernels.ops.attention.linear import fused_sigmoid_gating_recurrent as recurrent
    from sglang.kernels.ops.mamba import causal_conv1d_triton as convolution
    from sglang.srt.layers.attention.linear.gdn_backend import GDNAttnBackend

    assert "self._use_strided_target_verify_qkv = " in inspect.getsource(GDNAttnBackend.__init__)
    torch.manual_seed(0)
    conv_dim, drafts, sequences = 2 * H * K + HV * V, 4, 2
    qkvz = torch.randn(sequences * drafts, conv_dim + HV * V)
    ba = torch.randn(sequences * drafts, 2 * HV)
    weight, slots = torch.randn(conv_dim, WIDTH), torch.tensor([1, 3], dtype=torch.int32)
    rows = torch.arange(sequences, dtype=torch.int32)
    states, conv_states = torch.randn(SLOTS, HV, V, K), torch.randn(SLOTS, conv_dim, WIDTH - 1)

    def convolve(qkv: Tensor) -> list[Tensor]:
        kept = torch.zeros(sequences, drafts, conv_dim, WIDTH - 1)
        given = qkv.view(sequences, drafts, -1).transpose(1, 2)
        out = convolution.causal_conv1d_update(
            given,
            state := conv_states.clone(),
            weight,
            None,
            "silu",
            conv_state_indices=slots,
            intermediate_conv_window=kept,
            intermediate_state_indices=rows,
        )
        return [out.transpose(1, 2).view(sequences * drafts, -1), kept, state]

    def verify(qkv: Tensor, b: Tensor, a: Tensor) -> list[Tensor]:
        q, k, v = qkv[None].split([H * K, H * K, HV * V], dim=-1)
        kept = torch.zeros(sequences, drafts, HV, V, K)
        out = recurrent.fused_sigmoid_gating_delta_rule_update(
            A_log=torch.zeros(HV),
            dt_bias=torch.zeros(HV),
            q=q.unflatten(-1, (H, K)),
            k=k.unflatten(-1, (H, K)),
            v=v.unflatten(-1, (HV, V)),
            a=a,
            b=b,
            initial_state_source=states,
            initial_state_indices=slots,
            cu_seqlens=torch.tensor([0, drafts, 2 * drafts], dtype=torch.int32),
            use_qk_l2norm_in_kernel=True,
            softplus_beta=1.0,
            softplus_threshold=20.0,
            disable_state_update=True,
            intermediate_states_buffer=kept,
            intermediate_state_indices=rows,
            cache_steps=drafts,
        )
        return [out, kept]

    def differ(ours: list[Tensor], theirs: list[Tensor]) -> float:
        assert all(x.abs().max() > 0 for x in theirs)
        return max(float((x - y).abs().max()) for x, y in zip(ours, theirs, strict=True))

    with patch.object(convolution, "is_arch_support_pdl", bool), patch.object(recurrent, "is_arch_support_pdl", bool):
        qkv, (b, a) = qkvz[:, :conv_dim], ba.chunk(2, dim=-1)
        mixed = convolve(qkv.contiguous())
        found = {"convolution": differ(convolve(qkv), mixed)}
        copies = verify(mixed[0], b.contiguous(), a.contiguous())
        found["delta rule"] = differ(verify(mixed[0], b, a), copies)
        swapped = differ(verify(mixed[0], a, b), copies)
    assert swapped > 0.1
    return found


def backends(model: str, cases: list[dict[str, Any]]) -> list[list[str]]:
    """Return what doctor names for prompts, decode steps and drafts, on GPUs of the given ``capability``."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.attention.linear import gdn_backend
    from sglang.srt.layers.attention.linear.kernels import gdn_flashinfer
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import attn_tp_size_of
    from sglang.srt.server_args import prepare_server_args

    from sglang_ext.tools import doctor

    load_plugins()
    found = []
    for case in cases:
        server_args = prepare_server_args(["--model-path", model, "--dtype", "bfloat16", *case["flags"]])
        server_args.resolve_once()
        with (
            patch.object(gdn_backend, "is_cuda", lambda: True),
            patch.object(gdn_flashinfer, "is_flashinfer_gdn_prefill_available", lambda: True),
            patch.object(torch.cuda, "get_device_capability", lambda capability=case["capability"]: capability),
            patch.object(torch.version, "cuda", "13.0"),
        ):
            kernels = doctor.kernels_on_gpu(server_args, ModelConfig.from_server_args(server_args))
        assert attn_tp_size_of(resolving_view(server_args)) == 1
        found.append([kernels[phase][0] for phase in ("prefill", "decode", "verify")])
    return found
