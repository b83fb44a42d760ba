"""Next-token log-probabilities from `transformers`, the reference for every engine.

``Whole`` loads a checkpoint. ``Streamed`` keeps in memory only one decoder layer without its experts, and one expert;
it also reads quantized checkpoints, and dequantizes their weights. Both use the modules of `transformers`. ``Recorded``
looks up in a file what was computed before.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as modeling

from qnext_plugin.checkpoint.headers import INDEX_FILE, SINGLE_FILE, read_headers
from qnext_plugin.checkpoint.merged import MERGED, PARTS, layer_of
from qnext_plugin.checkpoint.quantization import is_quantized, stored_modules
from qnext_plugin.checkpoint.stored import read_checkpoint
from qnext_plugin.verify.rows import Query, Reference, Rows

_VOCAB_CHUNK = 8192


def reference(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Reference:
    """Return ``Whole`` if it fits in memory, is not quantized and ``transformers`` finds it, otherwise ``Streamed``."""
    stored = read_checkpoint(str(checkpoint))
    parameters = sum(torch.Size(info.shape).numel() for info in (stored.headers or {}).values())
    fits = 1.25 * parameters * dtype.itemsize < _available_bytes()
    found = stored.quantization is None and any((checkpoint / name).exists() for name in (SINGLE_FILE, INDEX_FILE))
    return Whole(checkpoint, dtype) if fits and found else Streamed(checkpoint, dtype)


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


class Whole:
    """A teacher-forced forward pass of one checkpoint in ``dtype``. It computes each sequence alone, and only once."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        model, info = Qwen3NextForCausalLM.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"{checkpoint}: transformers does not find {sorted(info['missing_keys'])[:3]}")
        self.model, self.device = model.eval().to(device), device
        self._rows = cache(self._compute)

    def __call__(self, queries: Sequence[Query]) -> list[Rows]:
        return [self._rows(query) for query in tqdm(queries, desc="Reference", unit="sequence", disable=None)]

    @torch.inference_mode()
    def _compute(self, query: Query) -> Rows:
        wanted = torch.arange(len(query.ids))[query.rows]
        with _margins(self.model, len(query.ids)) as margin:
            ids = torch.tensor([query.ids], device=self.device)
            logits = self.model(ids, use_cache=False, logits_to_keep=wanted.to(self.device)).logits[0]
        return Rows.of(logits.float().log_softmax(-1).cpu(), margin.cummin(0).values[wanted])


class Streamed:
    """A forward pass that needs little memory.

    It reads every layer once for all sequences, and every expert when it is needed.
    """

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint, self.dtype = read_checkpoint(str(checkpoint)), dtype
        self.headers = self.checkpoint.headers or {}
        self.modules = stored_modules(self.headers)
        self.config = Qwen3NextConfig.from_pretrained(checkpoint)
        self.config._attn_implementation, self.config._experts_implementation = "sdpa", "eager"

    @torch.inference_mode()
    def __call__(self, queries: Sequence[Query]) -> list[Rows]:
        lengths = [len(query.ids) for query in queries]
        tokens = torch.tensor([token for query in queries for token in query.ids])
        hidden = self._tensor("model.embed_tokens.weight", tokens)[None]
        rotary, margin = modeling.Qwen3NextRotaryEmbedding(self.config), torch.full((len(tokens),), torch.inf)
        rotations = [rotary(hidden, torch.arange(length)[None]) for length in lengths]
        for i in tqdm(range(self.config.num_hidden_layers), desc="Reference", unit="layer", disable=None):
            with self._layer(i) as layer, _margins(layer, len(tokens)) as least:
                # This is the layer's own forward, except that the mixer takes one sequence at a time.
                mixed = zip(layer.input_layernorm(hidden).split(lengths, dim=1), rotations, strict=True)
                hidden = hidden + torch.cat([_mix(layer, x, rotation) for x, rotation in mixed], dim=1)
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            margin = margin.minimum(least)
        norm = modeling.Qwen3NextRMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        norm.weight = nn.Parameter(self._tensor("model.norm.weight"))
        sequences = zip(queries, norm(hidden)[0].split(lengths), margin.split(lengths), strict=True)
        return [
            Rows.of(self._logprobs(x[query.rows]), least.cummin(0).values[query.rows]) for query, x, least in sequences
        ]

    @contextmanager
    def _layer(self, index: int) -> Iterator[nn.Module]:
        with torch.device("meta"):
            layer = modeling.Qwen3NextDecoderLayer(self.config, index).eval()
        prefix = f"model.layers.{index}."
        if isinstance(layer.mlp, modeling.Qwen3NextSparseMoeBlock):
            experts = layer.mlp.experts
            for name, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
                delattr(experts, name)
                setattr(experts, name, _Experts(self, f"{prefix}mlp.experts", name, parts))
        layer.load_state_dict({name: self._tensor(prefix + name) for name in layer.state_dict()}, assign=True)
        yield layer

    def _logprobs(self, hidden: Tensor) -> Tensor:
        name = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        vocab = range(0, self.config.vocab_size, _VOCAB_CHUNK)
        heads = (self._tensor(name, slice(start, start + _VOCAB_CHUNK)) for start in vocab)
        return torch.cat([nn.functional.linear(hidden, head) for head in heads], dim=-1).float().log_softmax(-1)

    def _tensor(self, name: str, rows: Any = slice(None)) -> Tensor:
        """Return rows of a tensor of the checkpoint; the file is mapped, so other rows of a plain one are not read."""
        module, _, leaf = name.rpartition(".")
        fused = layer_of(module)
        if module not in self.modules and fused in self.modules:
            layer, (section,) = PARTS[module.rpartition(".")[2]]
            return self._tensor(f"{fused}.{leaf}").chunk(MERGED[layer].num_sections)[int(section)][rows]
        leaves = self.modules.get(module, {})
        if leaf == "weight" and leaves and is_quantized(leaves):
            whole = {leaf: self._read(f"{module}.{leaf}") for leaf in leaves}
            return self.checkpoint.dequantize(whole)[rows].to(self.dtype)
        return self._read(name)[rows].to(self.dtype, copy=True)

    def _read(self, name: str) -> Tensor:
        if name not in self.headers:
            raise ValueError(f"the checkpoint has no {name}, which transformers needs")
        with safe_open(self.headers[name].file, framework="pt") as file:
            return file.get_tensor(name)


@dataclass
class _Experts:
    """A replacement for a parameter ``[experts, ...]`` that reads one expert when it is indexed."""

    source: Streamed
    prefix: str
    name: str
    parts: tuple[str, ...]

    def __getitem__(self, expert: Tensor) -> Tensor:
        fused = f"{self.prefix}.{self.name}"
        if fused in self.source.headers:
            return self.source._tensor(fused, int(expert))
        return torch.cat([self.source._tensor(f"{self.prefix}.{int(expert)}.{part}.weight") for part in self.parts])


def _mix(layer: nn.Module, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    if layer.block_type == "linear_attention":
        return layer.linear_attn(hidden_states=x)
    return layer.self_attn(hidden_states=x, attention_mask=None, position_embeddings=rotation)[0]


@contextmanager
def _margins(model: nn.Module, num_tokens: int) -> Iterator[Tensor]:
    """Yield a tensor ``[num_tokens]`` that receives the smallest margin between experts of the routers that run."""
    margin = torch.full((num_tokens,), torch.inf)

    def note(router: Any, args: Any, output: tuple[Tensor, ...]) -> None:
        if router.top_k < router.num_experts:
            best = output[0].float().topk(router.top_k + 1).values
            margin.copy_(margin.minimum((best[:, -2] - best[:, -1]).cpu()))

    routers = [m for m in model.modules() if isinstance(m, modeling.Qwen3NextTopKRouter)]
    handles = [router.register_forward_hook(note) for router in routers]
    try:
        yield margin
    finally:
        for handle in handles:
            handle.remove()


class Recorded:
    """A store of one checkpoint's rows in memory and in ``file``, if given; missing rows are computed and added.

    A row's key is the whole sequence up to it, so a later run finds it also in another scenario with the same tokens.
    Raises ``ValueError`` if the file belongs to another checkpoint.
    """

    def __init__(self, checkpoint: Path, file: Path | None = None) -> None:
        self.checkpoint, self.file = checkpoint, file
        self.rows: dict[bytes, tuple[Tensor, ...]] = {}
        if file is None:
            return
        self.metadata = {"checkpoint": fingerprint(checkpoint)}
        if file.exists():
            with safe_open(file, framework="pt") as f:
                found = f.metadata()
            if found != self.metadata:
                raise ValueError(f"{file}: holds the reference of {found}, expected {self.metadata}; use another file")
            kept = load_file(file)
            keys = [bytes(key.tolist()) for key in kept.pop("keys")]
            self.rows = dict(zip(keys, zip(kept["ids"], kept["logprobs"], kept["margin"], strict=True), strict=True))

    def of(self, dtype: torch.dtype) -> Reference:
        return partial(self._answer, dtype)

    def _answer(self, dtype: torch.dtype, queries: Sequence[Query]) -> list[Rows]:
        keys = {query: _keys(query, dtype) for query in queries}
        missing = [query for query in keys if not self.rows.keys() >= set(keys[query])]
        if missing:
            for query, rows in zip(missing, reference(self.checkpoint, dtype)(missing), strict=True):
                self.rows |= zip(keys[query], zip(rows.ids, rows.logprobs, rows.margin, strict=True), strict=True)
            if self.file is not None:
                self._write(self.file)
        return [Rows(*map(torch.stack, zip(*map(self.rows.get, keys[query]), strict=True))) for query in queries]

    def _write(self, file: Path) -> None:
        ids, logprobs, margin = map(torch.stack, zip(*self.rows.values(), strict=True))
        keys = torch.tensor([list(key) for key in self.rows], dtype=torch.uint8)
        partly = file.with_name(file.name + ".partial")
        save_file({"keys": keys, "ids": ids, "logprobs": logprobs, "margin": margin}, partly, metadata=self.metadata)
        partly.replace(file)


def _keys(query: Query, dtype: torch.dtype) -> list[bytes]:
    keys, digest = [], hashlib.sha256(str(dtype).encode())
    for token in query.ids[:-1]:
        digest.update(token.to_bytes(4, "little"))
        keys.append(digest.digest()[:16])
    return keys[query.rows]


def fingerprint(checkpoint: Path) -> str:
    """Return a hash of the configuration and of a few bytes of every tensor."""
    digest = hashlib.sha256(json.dumps(json.loads((checkpoint / "config.json").read_text()), sort_keys=True).encode())
    files: dict[Path, list[str]] = {}
    for name, info in sorted(read_headers(checkpoint).items()):
        digest.update(f"{name} {info.shape} {info.dtype}".encode())
        files.setdefault(info.file, []).append(name)
    for path, names in sorted(files.items()):
        with safe_open(path, framework="pt") as file:
            for name in names:
                digest.update(file.get_tensor(name).flatten()[:8].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
