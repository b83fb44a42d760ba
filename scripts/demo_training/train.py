"""Train the demo model: ``scripts/train_demo --help``."""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from demo_training.data import KINDS, Maker, corpus, row
from demo_training.examination import Examination
from demo_training.model import Model, Weights, init_weights, to_published
from demo_training.optimizer import STEPS, Optimizer
from demo_training.tokenizer import Encoder, train_tokenizer
from qnext_plugin.config import QNextConfig

DATA = Path(__file__).parents[2] / "qnext_plugin" / "data"
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 8192,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 1024,
}
SEED = 0
TOKENS = 2048  # in a step
DRAFT_WEIGHT, BALANCE_WEIGHT = 0.3, 0.01
# From this step on: row lengths and how often, then kinds of rows and how often.
CURRICULUM = (
    (0, {128: 1}, {"pairs": 4, "recall": 4, "chat": 4}),
    (110, {128: 3, 256: 2, 384: 3}, {"pairs": 1, "recall": 5, "chat": 3, "tool": 6, "base": 1}),
    (200, {128: 4, 256: 3, 384: 2}, {"pairs": 4, "recall": 6, "chat": 2, "tool": 6, "base": 1}),
    (600, {128: 2, 256: 3, 384: 3, 512: 2}, {"pairs": 1, "recall": 6, "chat": 2, "tool": 5, "base": 1}),
    (800, {128: 3, 256: 3, 384: 3, 512: 2}, {"echo": 4, "recall": 6, "chat": 2, "tool": 5, "base": 1}),
    (
        1050,
        {128: 3, 256: 4, 384: 2, 512: 2},
        {"echo": 2, "plain recall": 7, "recall": 2, "chat": 2, "tool": 5, "base": 1},
    ),
    (
        1300,
        {128: 2, 256: 3, 384: 2, 512: 2, 1024: 4},
        {"echo": 1, "plain recall": 6, "recall": 1, "chat": 3, "tool": 4, "base": 1},
    ),
    (
        1350,
        {128: 2, 256: 4, 384: 2, 512: 3, 1024: 2},
        {"pairs": 5, "plain recall": 6, "echo": 1, "chat": 2, "tool": 3, "base": 1},
    ),
    (
        1550,
        {128: 2, 256: 5, 384: 3, 512: 3, 1024: 2},
        {"pairs": 5, "plain recall": 12, "echo": 1, "chat": 2, "tool": 2, "base": 1},
    ),
)
# From this step on: the share of rows from which the drafts learn.
DRAFT_SHARES = ((0, 0.25), (500, 0.5))
SHORTEST_TOOL = 384
RECORD = Path(__file__).parent / "loss.json"
CHECK_STEPS, TOLERANCE = 60, 0.03


def batch(encode: Encoder, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Token ids and loss weights, [B, L] with B * L = ``TOKENS``, of one training step."""
    rng = random.Random(f"{seed}-{step}")
    maker = Maker(rng, encode)
    _, lengths, kinds = [stage for stage in CURRICULUM if stage[0] <= step][-1]
    length = rng.choices(list(lengths), list(lengths.values()))[0]
    if length < SHORTEST_TOOL:
        kinds = {k: n for k, n in kinds.items() if k != "tool"}
    if length > 512:
        kinds = {k: n for k, n in kinds.items() if "recall" in k}
    rows = [
        row(encode, KINDS[rng.choices(list(kinds), list(kinds.values()))[0]](maker, length), length)
        for _ in range(TOKENS // length)
    ]
    return torch.tensor([ids for ids, _ in rows]), torch.tensor([weights for _, weights in rows])


def losses(model: Model, ids: Tensor, weights: Tensor, step: int) -> tuple[Tensor, list[float]]:
    """The training loss, and the mean loss of the next token, of each draft, and the balance."""
    hidden = model.trunk(ids)
    share = [share for start, share in DRAFT_SHARES if start <= step][-1]
    some = max(1, int(len(ids) * share))
    parts = [_cross_entropy(model, hidden, ids, weights, 1)]
    for i, draft in enumerate(model.drafts(ids[:some], hidden[:some], 2)):
        parts.append(_cross_entropy(model, draft[:, i:], ids[:some, i:], weights[:some, i:], 2))
    balance = torch.stack(model.balance).mean()
    total = parts[0] + DRAFT_WEIGHT * (parts[1] + 0.5 * parts[2]) + BALANCE_WEIGHT * balance
    return total, [float(p.detach()) for p in (*parts, balance)]


def _cross_entropy(model: Model, hidden: Tensor, ids: Tensor, weights: Tensor, ahead: int) -> Tensor:
    learnt = weights[:, ahead:] > 0
    logits = model.logits(hidden[:, :-ahead][learnt])
    return F.cross_entropy(logits, ids[:, ahead:][learnt])


def write_checkpoint(directory: Path, weights: Weights, tokenizer: Tokenizer) -> None:
    """The checkpoint in the published form: bfloat16 weights, configuration, tokenizer with chat template."""
    config = QNextConfig.from_dict(CONFIG)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.detach().to(torch.bfloat16).contiguous() for n, t in to_published(weights, config).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {t: tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>")}
    files = {
        "config.json": CONFIG | {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]},
        "generation_config.json": {"eos_token_id": list(ids.values())[::-1], "pad_token_id": ids["<|endoftext|>"]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": (DATA / "chat_template.jinja").read_text(),
        },
    }
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value, indent=2) + "\n")


def make_tokenizer(seed: int) -> Tokenizer:
    # Lengths are in tokens; before there is a tokenizer, about three characters each.
    return train_tokenizer(corpus(seed, lambda text: list(range(len(text) // 3))))


def train(directory: Path, every: int, until: int = STEPS) -> list[float]:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(SEED)
    encode = Encoder(tokenizer)
    config = QNextConfig.from_dict(CONFIG)
    weights = {n: t.requires_grad_() for n, t in init_weights(config, SEED).items()}
    optimizer = Optimizer(weights)
    curve: list[float] = []
    saved = directory / "state.pt"
    if saved.exists():
        state = torch.load(saved)
        for name, weight in weights.items():
            weight.data.copy_(state["weights"][name])
        optimizer.state, optimizer.step_count, curve = state["optimizer"], len(state["curve"]), state["curve"]
        print(f"resuming at step {len(curve)} of {STEPS}", flush=True)
    model, examination = Model(config, weights), Examination(encode, SEED)
    recent, started, first = Counter(), time.monotonic(), len(curve)
    for step in range(first, until):
        ids, loss_weights = batch(encode, SEED, step)
        loss, parts = losses(model, ids, loss_weights, step)
        loss.backward()
        optimizer.step()
        curve.append(parts[0])
        recent.update(dict(enumerate(parts)))
        if (step + 1) % 20 == 0:
            rate = (step + 1 - first) / (time.monotonic() - started)
            shown = " ".join(f"{recent[i] / 20:.3f}" for i in range(4))
            left = (STEPS - step) / rate / 60
            print(f"step {step + 1}/{STEPS} loss {shown} {rate * TOKENS:.0f} tok/s, {left:.0f} min left", flush=True)
            recent.clear()
        if (step + 1) % every == 0 or step + 1 == STEPS:
            marks = examination(model)
            print("  " + ", ".join(f"{k} {v:.0%}" for k, v in marks.items()), flush=True)
            part = saved.with_suffix(".part")
            torch.save({"weights": weights, "optimizer": optimizer.state, "curve": curve}, part)
            os.replace(part, saved)
            if (step + 1) % (5 * every) == 0:
                shutil.copy(saved, directory / f"state-{step + 1}.pt")
    if len(curve) == STEPS:
        write_checkpoint(directory / "checkpoint", weights, tokenizer)
        (directory / RECORD.name).write_text(json.dumps([round(loss, 4) for loss in curve]) + "\n")
    return curve


def check() -> None:
    """Train the first ``CHECK_STEPS`` steps anew and hold their loss against the record."""
    expected = json.loads(RECORD.read_text())
    with tempfile.TemporaryDirectory() as directory:
        curve = train(Path(directory), every=STEPS, until=CHECK_STEPS)
    off = [
        abs(sum(curve[i : i + 10]) / sum(expected[i : i + 10]) - 1) for i in range(0, CHECK_STEPS, 10)
    ]  # of the means of ten steps
    print("off the recorded loss by " + ", ".join(f"{x:.2%}" for x in off) + f"; at most {TOLERANCE:.0%} is right")
    if max(off) > TOLERANCE:
        raise SystemExit("train_demo: the loss is not the recorded one")


def main() -> None:
    parser = argparse.ArgumentParser(prog="train_demo", description="Train the demo checkpoint, or go on with it.")
    parser.add_argument("--directory", type=Path, default=Path.home() / ".cache/qnext-plugin/train-demo")
    parser.add_argument("--every", type=int, default=100, metavar="N", help="steps between examinations")
    parser.add_argument("--check", action="store_true", help=f"train {CHECK_STEPS} steps, compare the loss, stop")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the result then depends on nothing but the kind of processor
    if args.check:
        check()
    else:
        train(args.directory, args.every)
        print(f"done: {args.directory / 'checkpoint'}; to ship it, copy its files to {DATA / 'demo'}")


if __name__ == "__main__":
    main()
