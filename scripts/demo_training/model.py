"""The demo model as one differentiable function of whole batches: the chunked form of every layer, in float32.

Parameters carry the checkpoint's published names; only the experts of a layer are one tensor each
(``experts.gate_up_proj`` [experts, hidden, 2 * intermediate], ``experts.down_proj`` [experts, intermediate, hidden]).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext_plugin.checkpoint.make_random import random_tensor
from qnext_plugin.checkpoint.schema import expected_tensors
from qnext_plugin.config import LINEAR, QNextConfig
from qnext_plugin.ops import gating, l2norm

Weights = dict[str, Tensor]
CHUNK = 64


def init_weights(config: QNextConfig, seed: int) -> Weights:
    """Random weights in training form; the DeltaNet decays span memories of tens to thousands of tokens."""
    published = {n: random_tensor(n, shape, seed) for n, shape in expected_tensors(config).items()}
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in published.items():
        leaf = name.split(".")[-1]
        module = name.split(".")[-2]
        if leaf == "A_log":
            tensor.zero_()
        elif leaf == "dt_bias":
            steps = torch.empty_like(tensor).uniform_(-8.5, -3.5, generator=generator).exp()
            tensor.copy_(steps.expm1().log())
        elif tensor.dim() == 1:
            tensor.fill_(1.0 if name.endswith("linear_attn.norm.weight") else 0.0)
        elif module in ("o_proj", "out_proj", "down_proj") or module in ("lm_head", "gate", "shared_expert_gate"):
            tensor.mul_(0.1)
    return _fuse(published, config)


def to_published(weights: Weights, config: QNextConfig) -> Weights:
    """The same weights one tensor per expert, as a checkpoint stores them."""
    out = {}
    for name, tensor in weights.items():
        stem, _, leaf = name.rpartition(".experts.")
        if not stem:
            out[name] = tensor
        elif leaf == "gate_up_proj":
            for i, expert in enumerate(tensor):
                gate, up = expert.T.chunk(2)
                out[f"{stem}.experts.{i}.gate_proj.weight"] = gate.contiguous()
                out[f"{stem}.experts.{i}.up_proj.weight"] = up.contiguous()
        else:
            for i, expert in enumerate(tensor):
                out[f"{stem}.experts.{i}.down_proj.weight"] = expert.T.contiguous()
    assert {n: tuple(t.shape) for n, t in out.items()} == expected_tensors(config)
    return out


def _fuse(published: Weights, config: QNextConfig) -> Weights:
    out = {n: t for n, t in published.items() if ".experts." not in n}
    for stem in {n.partition(".experts.")[0] for n in published if ".experts." in n}:
        experts = [f"{stem}.experts.{i}" for i in range(config.num_experts)]
        gate_up = [torch.cat([published[f"{e}.{p}_proj.weight"] for p in ("gate", "up")]).T for e in experts]
        out[f"{stem}.experts.gate_up_proj"] = torch.stack(gate_up)
        out[f"{stem}.experts.down_proj"] = torch.stack([published[f"{e}.down_proj.weight"].T for e in experts])
    return dict(sorted(out.items()))


class Model:
    """``weights`` in training form. ``balance`` collects the router's balancing loss of a forward pass."""

    def __init__(self, config: QNextConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights
        self.balance: list[Tensor] = []

    def trunk(self, input_ids: Tensor) -> Tensor:
        """``input_ids`` [B, L] to the hidden states after the final norm, [B, L, hidden]."""
        self.balance = []
        hidden = self._embed(input_ids)
        for i, kind in enumerate(self.config.layer_types):
            name = f"model.layers.{i}"
            x = self._norm(f"{name}.input_layernorm", hidden)
            if kind == LINEAR:
                hidden = hidden + self._gated_delta_net(f"{name}.linear_attn", x)
            else:
                q, k, v, gate = self._qkv(f"{name}.self_attn", x)
                hidden = hidden + self._attend(f"{name}.self_attn", q, k, v, gate)
            hidden = self._feed_forward(name, hidden)
        return self._norm("model.norm", hidden)

    def drafts(self, input_ids: Tensor, hidden: Tensor, steps: int) -> list[Tensor]:
        """The MTP layer unrolled over ``hidden`` [B, L, hidden] of ``trunk``, every position at once.

        Item ``s`` is [B, L, hidden]; its position ``t`` predicts the token at ``t + 2`` after ``s`` steps that began at
        ``t - s`` with the trunk's hidden (positions below ``s`` are void). A later step attends to the first step's
        keys before its own position, as an engine's cache holds them, and to itself.
        """
        next_embedding = self._norm("mtp.pre_fc_norm_embedding", self._embed(F.pad(input_ids[:, 1:], (0, 1))))
        name, length = "mtp.layers.0", hidden.shape[1]
        out: list[Tensor] = []
        for step in range(steps):
            x = torch.cat([next_embedding, self._norm("mtp.pre_fc_norm_hidden", hidden)], dim=-1)
            residual = self._linear("mtp.fc", x)
            x = self._norm(f"{name}.input_layernorm", residual)
            q, k, v, gate = self._qkv(f"{name}.self_attn", x)
            if step == 0:
                first_k, first_v, mask = k, v, None
            else:
                mask = _draft_mask(length, step)
                k, v = torch.cat([first_k, k], dim=2), torch.cat([first_v, v], dim=2)
            x = residual + self._attend(f"{name}.self_attn", q, k, v, gate, mask)
            x = self._norm("mtp.norm", self._feed_forward(name, x))
            out.append(x)
            hidden = F.pad(x[:, :-1], (0, 0, 1, 0))
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weights["lm_head.weight"])

    def _gated_delta_net(self, name: str, x: Tensor) -> Tensor:
        dims = self.config.gdn
        groups, width = dims.num_k_heads, dims.heads_per_group * dims.head_v_dim
        qkvz = self._linear(f"{name}.in_proj_qkvz", x).unflatten(-1, (groups, -1))
        q, k, v, z = qkvz.split([dims.head_k_dim, dims.head_k_dim, width, width], dim=-1)
        b, a = self._linear(f"{name}.in_proj_ba", x).unflatten(-1, (groups, -1)).chunk(2, dim=-1)
        qkv = torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1)
        qkv = F.silu(_CausalConv1d.apply(qkv, self.weights[f"{name}.conv1d.weight"].squeeze(1)))
        q, k, v = qkv.split([dims.key_dim, dims.key_dim, dims.value_dim], dim=-1)
        g, beta = gating(
            a.flatten(2), b.flatten(2), A_log=self.weights[f"{name}.A_log"], dt_bias=self.weights[f"{name}.dt_bias"]
        )
        out = gated_delta_rule(
            q.unflatten(-1, (groups, -1)),
            k.unflatten(-1, (groups, -1)),
            v.unflatten(-1, (dims.num_v_heads, -1)),
            g,
            beta,
        )
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        out = out * self.weights[f"{name}.norm.weight"] * F.silu(z.reshape(out.shape))
        return self._linear(f"{name}.out_proj", out.flatten(2))

    def _qkv(self, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        head = self.config.head_dim
        q, gate = self._linear(f"{name}.q_proj", x).unflatten(-1, (-1, 2 * head)).chunk(2, dim=-1)
        k = self._linear(f"{name}.k_proj", x).unflatten(-1, (-1, head))
        v = self._linear(f"{name}.v_proj", x).unflatten(-1, (-1, head))
        q, k = self._norm(f"{name}.q_norm", q), self._norm(f"{name}.k_norm", k)
        cos, sin = self._rotary(x.shape[1])
        return _rotate(q, cos, sin).transpose(1, 2), _rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2), gate

    def _attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: Tensor | None = None) -> Tensor:
        per_kv = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(per_kv, dim=1), v.repeat_interleave(per_kv, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self._linear(f"{name}.o_proj", (out.transpose(1, 2) * gate.sigmoid()).flatten(2))

    def _rotary(self, length: int) -> tuple[Tensor, Tensor]:
        rope, dim = self.config.rope_parameters, self.config.rotary_dim
        frequencies = rope["rope_theta"] ** -(torch.arange(0, dim, 2) / dim)
        angles = torch.arange(length)[:, None] * frequencies
        return angles.cos()[:, None], angles.sin()[:, None]

    def _feed_forward(self, name: str, hidden: Tensor) -> Tensor:
        x = self._norm(f"{name}.post_attention_layernorm", hidden)
        return hidden + self._sparse_moe(f"{name}.mlp", x.flatten(0, 1)).view_as(hidden)

    def _sparse_moe(self, name: str, x: Tensor) -> Tensor:
        config = self.config
        probabilities = self._linear(f"{name}.gate", x).softmax(-1)
        weights, ids = probabilities.topk(config.num_experts_per_tok, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        counts = torch.bincount(ids.flatten(), minlength=config.num_experts)
        # Switch Transformers, arXiv:2101.03961, eq. 4: 1 when balanced.
        self.balance.append((counts / ids.numel() * probabilities.mean(0)).sum() * config.num_experts)
        order = ids.flatten().argsort(stable=True)
        token = order // config.num_experts_per_tok
        # Unbound, not indexed: the gradient of each index would be a tensor of all experts.
        gate_up, down = (self.weights[f"{name}.experts.{part}_proj"].unbind() for part in ("gate_up", "down"))
        experts = zip(x.index_select(0, token).split(counts.tolist()), gate_up, down, strict=True)
        parts = [_swiglu(rows @ up) @ down for rows, up, down in experts]
        routed = torch.cat(parts) * weights.flatten().index_select(0, order)[:, None]
        shared = self._linear(
            f"{name}.shared_expert.down_proj",
            F.silu(self._linear(f"{name}.shared_expert.gate_proj", x))
            * self._linear(f"{name}.shared_expert.up_proj", x),
        )
        out = shared * self._linear(f"{name}.shared_expert_gate", x).sigmoid()
        return out.index_add(0, token, routed)

    def _embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weights["model.embed_tokens.weight"])

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], 1 + self.weights[f"{name}.weight"], self.config.rms_norm_eps)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """``qnext_plugin.ops.chunk_gated_delta_rule`` from a zero state, differentiable, for equally long sequences.

    ``q``, ``k`` [B, L, Hk, K], ``v`` [B, L, Hv, V], ``g``, ``beta`` [B, L, Hv]; returns [B, L, Hv, V]. ``L`` is
    padded to whole chunks. Only the state's recurrence is a loop; what it reads is computed for all chunks at once.
    """
    batch, length, groups, k_dim = q.shape
    pad = -length % CHUNK

    def to_chunks(x: Tensor) -> Tensor:  # [B, Hk, Hv // Hk or 1, N, C, ...]
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad)).unflatten(2, (groups, -1)).unflatten(1, (-1, CHUNK))
        return x.permute(0, 3, 4, 1, 2, *range(5, x.dim()))

    q, k = to_chunks(l2norm(q) * k_dim**-0.5), to_chunks(l2norm(k))
    v, beta, log_decay = to_chunks(v), to_chunks(beta), to_chunks(g).cumsum(-1)

    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    decay = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    attention = q @ k.mT * decay
    system = k @ k.mT * decay * beta[..., None]
    from_start = log_decay.exp()[..., None]
    solve = torch.linalg.solve_triangular(system, torch.diag_embed(beta), upper=False, unitriangular=True)
    written, read = solve @ v, solve @ (k * from_start)
    to_end = k * (log_decay[..., -1:] - log_decay).exp()[..., None]
    whole = log_decay[..., -1, None, None].exp()

    state = v.new_zeros(*v.shape[:3], k_dim, v.shape[-1])
    states, deltas = [], []
    for w, r, e, d in zip(*(x.unbind(3) for x in (written, read, to_end, whole)), strict=True):
        delta = w - r @ state
        states.append(state)
        deltas.append(delta)
        state = d * state + e.mT @ delta
    out = attention @ torch.stack(deltas, 3) + (q * from_start) @ torch.stack(states, 3)
    return out.permute(0, 3, 4, 1, 2, 5).reshape(batch, length + pad, -1, v.shape[-1])[:, :length]


class _CausalConv1d(torch.autograd.Function):
    """Depthwise, ``x`` [B, L, C] and ``weight`` [C, W]; row by row, because what stays in the CPU's cache is faster."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = torch.empty_like(x)
        for row, into in zip(x, out, strict=True):
            torch.mul(row, weight[:, -1], out=into)
            for i in range(1, weight.shape[1]):
                into[i:].addcmul_(row[:-i], weight[:, -1 - i])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        for row, g, into in zip(x, grad, grad_x, strict=True):
            torch.mul(g, weight[:, -1], out=into)
            grad_weight[:, -1] += (g * row).sum(0)
            for i in range(1, weight.shape[1]):
                into[:-i].addcmul_(g[i:], weight[:, -1 - i])
                grad_weight[:, -1 - i] += (g[i:] * row[:-i]).sum(0)
        return grad_x, grad_weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [B, L, H, D]; the first ``2 * cos.shape[-1]`` of D rotate, first half against second."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _draft_mask(length: int, step: int) -> Tensor:
    """[L, 2 L]: the first step's keys before the own position, then the own key."""
    assert step == 1
    return torch.cat([torch.ones(length, length).tril(-1), torch.eye(length)], dim=1).bool()
