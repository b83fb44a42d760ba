"""Qwen3-Next computed from weights with the names and layout of the published checkpoint."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext_plugin.config import LINEAR, QNextConfig
from qnext_plugin.reference import formulas


class ReferenceModel:
    """The whole model for one sequence; every call computes all tokens, without a cache.

    ``weights`` maps checkpoint names (``model.layers.0.linear_attn.in_proj_qkvz.weight``, ...) to unquantized
    tensors on the CPU. Each tensor is converted to ``dtype`` when it is used, so a mapping may load tensors lazily.
    """

    def __init__(self, config: QNextConfig, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> None:
        self.config = config
        self.weights = weights
        self.dtype = dtype

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``logits`` [T, vocab] and ``hidden`` [T, hidden] (after the final norm) for ``input_ids`` [T]."""
        hidden = self._embed(input_ids)
        for layer_idx, layer_type in enumerate(self.config.layer_types):
            name = f"model.layers.{layer_idx}"
            hidden = self._layer(name, hidden, layer_type == LINEAR, self.config.is_sparse(layer_idx))
        hidden = self._norm("model.norm", hidden)
        return self._logits(hidden), hidden

    def mtp_forward(self, next_ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the MTP layer's ``logits`` [T, vocab] and ``hidden`` for ``next_ids`` [T] and ``hidden`` [T, hidden].

        Position ``t`` takes ``next_ids[t]``, which is the token at ``t + 1``, and ``hidden[t]``, the trunk's output
        after its final norm; its logits are for the token at ``t + 2``. RoPE uses position ``t``, as in the engines.
        To draft another token, append the drafted token to ``next_ids``, and ``hidden[-1]`` of the result to
        ``hidden``.
        """
        embedding = self._norm("mtp.pre_fc_norm_embedding", self._embed(next_ids))
        hidden = self._norm("mtp.pre_fc_norm_hidden", hidden.to(self.dtype))
        hidden = self._linear("mtp.fc", torch.cat([embedding, hidden], dim=-1))
        sparse = "mtp.layers.0.mlp.gate.weight" in self.weights
        hidden = self._norm("mtp.norm", self._layer("mtp.layers.0", hidden, linear_attention=False, sparse=sparse))
        return self._logits(hidden), hidden

    def _layer(self, name: str, hidden: Tensor, linear_attention: bool, sparse: bool) -> Tensor:
        x = self._norm(f"{name}.input_layernorm", hidden)
        if linear_attention:
            hidden = hidden + self._gated_delta_net(f"{name}.linear_attn", x)
        else:
            hidden = hidden + self._gated_attention(f"{name}.self_attn", x)
        x = self._norm(f"{name}.post_attention_layernorm", hidden)
        return hidden + (self._sparse_moe(f"{name}.mlp", x) if sparse else self._mlp(f"{name}.mlp", x))

    def _gated_delta_net(self, name: str, x: Tensor) -> Tensor:
        dims, num_tokens = self.config.gdn, len(x)
        # Rows are grouped by key head: each group has [q k v.. z..] and [b.. a..] for its value heads.
        per_group = dims.heads_per_group * dims.head_v_dim
        qkvz = self._linear(f"{name}.in_proj_qkvz", x).view(num_tokens, dims.num_k_heads, -1)
        q, k, v, z = qkvz.split([dims.head_k_dim, dims.head_k_dim, per_group, per_group], dim=-1)
        ba = self._linear(f"{name}.in_proj_ba", x).view(num_tokens, dims.num_k_heads, -1)
        b, a = (part.flatten(1) for part in ba.split(dims.heads_per_group, dim=-1))

        qkv = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=-1)
        conv_state = qkv.new_zeros(dims.conv_dim, dims.conv_kernel_size - 1)
        qkv, _ = formulas.causal_conv1d(qkv, self._weight(f"{name}.conv1d.weight").squeeze(1), conv_state)
        q, k, v = qkv.split([dims.key_dim, dims.key_dim, dims.value_dim], dim=-1)

        g, beta = formulas.gating(a, b, self._weight(f"{name}.A_log"), self._weight(f"{name}.dt_bias"))
        out, _ = formulas.gated_delta_rule(
            q.unflatten(-1, (dims.num_k_heads, dims.head_k_dim)),
            k.unflatten(-1, (dims.num_k_heads, dims.head_k_dim)),
            v.unflatten(-1, (dims.num_v_heads, dims.head_v_dim)),
            g,
            beta,
            qkv.new_zeros(dims.num_v_heads, dims.head_k_dim, dims.head_v_dim),
        )
        z = z.reshape(num_tokens, dims.num_v_heads, dims.head_v_dim)
        out = formulas.rms_norm_gated(out, z, self._weight(f"{name}.norm.weight"), self.config.rms_norm_eps)
        return self._linear(f"{name}.out_proj", out.flatten(1))

    def _gated_attention(self, name: str, x: Tensor) -> Tensor:
        config, head_dim = self.config, self.config.head_dim
        # Each head's rows are [query | gate].
        q, gate = self._linear(f"{name}.q_proj", x).unflatten(-1, (-1, 2 * head_dim)).chunk(2, dim=-1)
        k = self._linear(f"{name}.k_proj", x).unflatten(-1, (-1, head_dim))
        v = self._linear(f"{name}.v_proj", x).unflatten(-1, (-1, head_dim))

        frequencies, factor = formulas.rope_frequencies(config.rope_parameters, config.rotary_dim, self.dtype)
        angles = torch.arange(len(x), dtype=self.dtype)[:, None] * frequencies
        cos, sin = factor * angles.cos(), factor * angles.sin()
        q = formulas.rotate(self._norm(f"{name}.q_norm", q), cos, sin)
        k = formulas.rotate(self._norm(f"{name}.k_norm", k), cos, sin)
        out = formulas.causal_attention(q, k, v) * torch.sigmoid(gate)
        return self._linear(f"{name}.o_proj", out.flatten(1))

    def _sparse_moe(self, name: str, x: Tensor) -> Tensor:
        config = self.config
        router_logits = self._linear(f"{name}.gate", x)
        weights, ids = formulas.route(router_logits, config.num_experts_per_tok, config.norm_topk_prob)
        out = torch.sigmoid(self._linear(f"{name}.shared_expert_gate", x)) * self._mlp(f"{name}.shared_expert", x)
        for expert in ids.unique().tolist():
            token, choice = torch.nonzero(ids == expert, as_tuple=True)
            out[token] += weights[token, choice, None] * self._mlp(f"{name}.experts.{expert}", x[token])
        return out

    def _mlp(self, name: str, x: Tensor) -> Tensor:
        gate_proj, up_proj, down_proj = (self._weight(f"{name}.{part}_proj.weight") for part in ("gate", "up", "down"))
        return formulas.swiglu(x, gate_proj, up_proj, down_proj)

    def _embed(self, input_ids: Tensor) -> Tensor:
        return self._weight("model.embed_tokens.weight")[input_ids]

    def _logits(self, hidden: Tensor) -> Tensor:
        tied = self.config.tie_word_embeddings
        return F.linear(hidden, self._weight("model.embed_tokens.weight" if tied else "lm_head.weight"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return formulas.zero_centered_rms_norm(x, self._weight(f"{name}.weight"), self.config.rms_norm_eps)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        # Only attention has biases, if `attention_bias` is set.
        bias = self.config.attention_bias and ".self_attn." in name
        return F.linear(x, self._weight(f"{name}.weight"), self._weight(f"{name}.bias") if bias else None)

    def _weight(self, name: str) -> Tensor:
        if name not in self.weights:
            raise ValueError(f"checkpoint: no tensor {name!r}; expected an unquantized one by its published name")
        return self.weights[name].to(self.dtype)
