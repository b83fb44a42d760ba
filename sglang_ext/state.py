"""The Gated DeltaNet cache as SGLang stores it."""

from dataclasses import replace

import torch
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateDType, Mamba2StateShape, mamba2_state_dtype
from sglang.srt.environ import envs
from sglang.srt.runtime_context import get_model, linear_attn_tp_size
from transformers import PretrainedConfig

from qnext_plugin.config import QNextConfig
from sglang_ext.compat import ON_CPU


def cache_params(config: QNextConfig, engine_config: PretrainedConfig, layers: list[int]) -> Mamba2CacheParams:
    """Return the shapes and dtypes of one cache slot on one rank, for the given layers.

    SGLang's GPU kernels keep the recurrent state as ``[num_v_heads, head_v_dim, head_k_dim]``; our CPU kernels keep it
    canonical, ``[num_v_heads, head_k_dim, head_v_dim]``. Both take the same number of bytes.
    """
    dims = config.gdn
    shape = Mamba2StateShape.create(
        tp_world_size=linear_attn_tp_size(),
        intermediate_size=dims.value_dim,
        n_groups=dims.num_k_heads,
        num_heads=dims.num_v_heads,
        head_dim=dims.head_v_dim,
        state_size=dims.head_k_dim,
        conv_kernel=dims.conv_kernel_size,
        conv_shard_groups=[dims.key_dim, dims.key_dim, dims.value_dim],
    )
    if ON_CPU:
        heads, v, k = shape.temporal
        shape = replace(shape, temporal=(heads, k, v))
    return Mamba2CacheParams(shape=shape, layers=layers, dtype=state_dtypes(engine_config))


def state_dtypes(engine_config: PretrainedConfig) -> Mamba2StateDType:
    """Return SGLang's choice of state dtypes, with the convolution's inputs unrounded unless the user sets a dtype.

    SGLang's default, bfloat16 for every model, rounds the inputs that a float32 or float16 model convolves.
    """
    dtypes = mamba2_state_dtype(engine_config)
    if envs.SGLANG_MAMBA_CONV_DTYPE.is_set():
        return dtypes
    return replace(dtypes, conv=activation_dtype(engine_config))


def activation_dtype(engine_config: PretrainedConfig) -> torch.dtype:
    """Return the dtype that ``--dtype`` means for this checkpoint; SGLang's default for a float32 one is float16."""
    asked = get_model().dtype
    names = {"half": torch.float16, "float": torch.float32}
    if asked != "auto":
        return names.get(asked) or getattr(torch, asked)
    return torch.float16 if engine_config.dtype in (None, torch.float32) else engine_config.dtype
