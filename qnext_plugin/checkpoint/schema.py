"""The names and shapes of a Qwen3-Next checkpoint's weights; ``coverage`` compares them with what is there."""

from collections.abc import Iterator
from dataclasses import dataclass

from qnext_plugin.checkpoint.headers import DTYPE_NAMES, Shape
from qnext_plugin.config import FULL, QNextConfig

# The last name segments of the tensors that quantizers store instead of a module's `weight`, or beside it.
PACKED_WEIGHTS = ("qweight", "weight_packed")
QUANT_COMPANIONS = (
    *("weight_scale_inv", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_zero_point"),
    *("weight_shape", "weight_g_idx", "input_scale", "input_global_scale", "input_zero_point"),
    *("scales", "qzeros", "g_idx"),
)
FLOAT_DTYPES = tuple(DTYPE_NAMES.values())
BYTE_DTYPES = ("F8_E4M3", "I8")  # quantized, with one number in each element


@dataclass(frozen=True)
class _Layer:
    prefix: str
    full_attention: bool
    num_experts: int  # 0 for a dense MLP


def expected_tensors(
    config: QNextConfig,
    *,
    mtp: bool = True,
    split_in_proj: bool = False,
    fused_experts: bool = False,
    fused_mlp: bool = False,
) -> dict[str, Shape]:
    """Return the name and shape of every tensor of an unquantized checkpoint; a tied ``lm_head`` is left out.

    If ``split_in_proj``, the input projections are ``in_proj_{qkv,z,b,a}`` with flat rows instead of
    ``in_proj_{qkvz,ba}`` grouped by key head. If ``fused_experts``, the experts are ``experts.gate_up_proj``
    ``[experts, 2 * intermediate, hidden]`` and ``experts.down_proj`` ``[experts, hidden, intermediate]``, as
    ``transformers`` 5 writes them with ``save_original_format=False``. If ``fused_mlp``, shared experts and dense MLPs
    have ``gate_up_proj`` ``[2 * intermediate, hidden]``, as some quantizers write them.
    """
    tensors = _outer_tensors(config, mtp, lm_head=not config.tie_word_embeddings)
    for layer in _layers(config, mtp):
        tensors |= _layer_tensors(config, layer, split_in_proj, fused_experts, fused_mlp)
    return tensors


def both_forms(config: QNextConfig) -> list[dict[str, Shape]]:
    """Return the tensors of the two forms in which a checkpoint may store each layer: as published, and otherwise."""
    return [
        expected_tensors(config, split_in_proj=other, fused_experts=other, fused_mlp=other) for other in (False, True)
    ]


def weight_shapes(config: QNextConfig) -> dict[str, Shape]:
    """Return the shape of every weight of a checkpoint in either form, ``lm_head`` included."""
    published, other = both_forms(config)
    return {"lm_head.weight": (config.vocab_size, config.hidden_size)} | published | other


def _outer_tensors(config: QNextConfig, mtp: bool, lm_head: bool) -> dict[str, Shape]:
    hidden, vocab = config.hidden_size, config.vocab_size
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if lm_head:
        tensors["lm_head.weight"] = (vocab, hidden)
    if mtp:
        tensors["mtp.fc.weight"] = (hidden, 2 * hidden)
        for norm in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
            tensors[f"mtp.{norm}.weight"] = (hidden,)
    return tensors


def _layers(config: QNextConfig, mtp: bool) -> Iterator[_Layer]:
    for i, kind in enumerate(config.layer_types):
        yield _Layer(f"model.layers.{i}.", kind == FULL, config.num_experts if config.is_sparse(i) else 0)
    for i in range(config.num_nextn_predict_layers if mtp else 0):
        yield _Layer(f"mtp.layers.{i}.", True, config.draft.num_experts)


def _layer_tensors(
    config: QNextConfig, layer: _Layer, split_in_proj: bool, fused_experts: bool, fused_mlp: bool
) -> dict[str, Shape]:
    hidden = config.hidden_size
    mixer = _self_attn(config) if layer.full_attention else _linear_attn(config, split_in_proj)
    if layer.num_experts:
        mlp = _sparse_moe(config, layer.num_experts, fused_experts, fused_mlp)
    else:
        mlp = _mlp("mlp.", hidden, config.intermediate_size, fused_mlp)
    norms: dict[str, Shape] = {f"{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
    return {layer.prefix + name: shape for name, shape in (norms | mixer | mlp).items()}


def _linear_attn(config: QNextConfig, split_in_proj: bool) -> dict[str, Shape]:
    dims, hidden = config.gdn, config.hidden_size
    v_heads = dims.num_v_heads
    if split_in_proj:
        rows = {"qkv": dims.conv_dim, "z": dims.value_dim, "b": v_heads, "a": v_heads}
    else:
        rows = {"qkvz": dims.conv_dim + dims.value_dim, "ba": 2 * v_heads}
    tensors: dict[str, Shape] = {f"in_proj_{name}.weight": (n, hidden) for name, n in rows.items()}
    tensors |= {
        "conv1d.weight": (dims.conv_dim, 1, dims.conv_kernel_size),
        "A_log": (v_heads,),
        "dt_bias": (v_heads,),
        "norm.weight": (dims.head_v_dim,),
        "out_proj.weight": (hidden, dims.value_dim),
    }
    return {f"linear_attn.{name}": shape for name, shape in tensors.items()}


def _self_attn(config: QNextConfig) -> dict[str, Shape]:
    hidden, head = config.hidden_size, config.head_dim
    q_dim, kv_dim = config.num_attention_heads * head, config.num_key_value_heads * head
    projections = {  # q_proj also holds the output gate
        "q_proj": (2 * q_dim, hidden),
        "k_proj": (kv_dim, hidden),
        "v_proj": (kv_dim, hidden),
        "o_proj": (hidden, q_dim),
    }
    tensors: dict[str, Shape] = {f"{name}.weight": shape for name, shape in projections.items()}
    if config.attention_bias:
        tensors |= {f"{name}.bias": shape[:1] for name, shape in projections.items()}
    tensors |= {"q_norm.weight": (head,), "k_norm.weight": (head,)}
    return {f"self_attn.{name}": shape for name, shape in tensors.items()}


def _mlp(prefix: str, hidden: int, intermediate: int, fused: bool = False) -> dict[str, Shape]:
    inputs = {"gate_up_proj": 2 * intermediate} if fused else {"gate_proj": intermediate, "up_proj": intermediate}
    tensors: dict[str, Shape] = {f"{prefix}{name}.weight": (rows, hidden) for name, rows in inputs.items()}
    return tensors | {f"{prefix}down_proj.weight": (hidden, intermediate)}


def _sparse_moe(config: QNextConfig, experts: int, fused_experts: bool, fused_mlp: bool) -> dict[str, Shape]:
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size
    tensors: dict[str, Shape] = {"mlp.gate.weight": (experts, hidden), "mlp.shared_expert_gate.weight": (1, hidden)}
    tensors |= _mlp("mlp.shared_expert.", hidden, config.shared_expert_intermediate_size, fused_mlp)
    if fused_experts:
        tensors["mlp.experts.gate_up_proj"] = (experts, 2 * intermediate, hidden)
        tensors["mlp.experts.down_proj"] = (experts, hidden, intermediate)
    else:
        for i in range(experts):
            tensors |= _mlp(f"mlp.experts.{i}.", hidden, intermediate)
    return tensors


def expected_for(config: QNextConfig, names: set[str], mtp: bool) -> dict[str, Shape]:
    """Return the expected tensors, with each layer in the form in which ``names`` stores it."""
    modules = {name.rpartition(".")[0] for name in names}
    tensors = _outer_tensors(config, mtp, lm_head=not config.tie_word_embeddings or "lm_head.weight" in names)
    for layer in _layers(config, mtp):
        in_proj = f"{layer.prefix}linear_attn.in_proj_"
        merged = {in_proj + "qkvz", in_proj + "ba"} & modules
        split = {in_proj + part for part in ("qkv", "z", "b", "a")} & modules
        fused = {f"{layer.prefix}mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")} & names
        fused_mlp = {f"{layer.prefix}mlp.{part}gate_up_proj" for part in ("", "shared_expert.")} & modules
        tensors |= _layer_tensors(config, layer, bool(split and not merged), bool(fused), bool(fused_mlp))
    return tensors
