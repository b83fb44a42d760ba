"""What the model can do so far."""

import random
from typing import Any

import torch
from torch import Tensor

from demo_training.data import THOUGHT, Document, Maker, Segment, row
from demo_training.model import Model
from demo_training.questions import QUESTIONS
from demo_training.tokenizer import Encoder


class Examination:
    """How often the most likely tokens are the whole answer, on what training does not see (closed questions aside)."""

    def __init__(self, encode: Encoder, seed: int, size: int = 1) -> None:
        maker = Maker(random.Random(f"examination-{seed}"), encode, test=True)

        def rows(make: Any, length: int, count: int) -> tuple[Tensor, Tensor]:
            made = [row(encode, make(), length) for _ in range(count)]
            return torch.tensor([ids for ids, _ in made]), torch.tensor([weights for _, weights in made])

        closed = iter(QUESTIONS.items())
        self.papers = {
            "closed": rows(lambda: question(*next(closed)), 64, len(QUESTIONS)),
            "pairs": rows(lambda: maker.pairs(128), 128, 4),
            "recall 256": rows(lambda: maker.recall(256, pairs=6, speakers=0), 256, 8 * size),
            "spoken 256": rows(lambda: maker.recall(256, pairs=6, speakers=2), 256, 8 * size),
            "recall 1024": rows(lambda: maker.recall(1024, pairs=10, speakers=0), 1024, 4 * size),
            "spoken 1024": rows(lambda: maker.recall(1024, pairs=10, speakers=2), 1024, 2 * size),
            "think": rows(lambda: thinking(maker.rng), 96, 16),
            "tool": rows(lambda: maker.tool(512), 512, 4 * size),
        }

    @torch.no_grad()
    def __call__(self, model: Model) -> dict[str, float]:
        out = {}
        for name, (ids, weights) in self.papers.items():
            right, drafted = [], [[], []]
            for i in range(0, len(ids), 16):
                chunk, learnt = ids[i : i + 16], weights[i : i + 16] > 0
                hidden = model.trunk(chunk)
                hits = model.logits(hidden).argmax(-1)[:, :-1] == chunk[:, 1:]
                right += _spans(hits, learnt[:, 1:])
                if name == "closed":
                    for step, draft in enumerate(model.drafts(chunk, hidden, 2)):
                        where = learnt[:, 2:] & learnt[:, 1:-1]
                        where[:, :step] = False
                        guess = model.logits(draft).argmax(-1)[:, :-2] == chunk[:, 2:]
                        drafted[step].append(guess[where])
            out[name] = sum(right) / len(right)
            if name == "closed":
                out |= {f"draft {s + 1}": float(torch.cat(d).float().mean()) for s, d in enumerate(drafted)}
        return out


def question(text: str, answer: str) -> list[Segment]:
    return [
        (f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", 0.0),
        (f"{answer}<|im_end|>", 1.0),
    ]


def thinking(rng: random.Random) -> list[Segment]:
    doc, (text, answer) = Document(), rng.choice(list(QUESTIONS.items()))
    doc.say("user", text)
    doc.answer(answer, THOUGHT)
    return doc.segments


def _spans(hits: Tensor, learnt: Tensor) -> list[bool]:
    """Whether every token is right, for each run of learnt positions in each row."""
    out = []
    for hit, on in zip(hits.tolist(), learnt.tolist(), strict=True):
        run: list[bool] = []
        for h, o in zip([*hit, False], [*on, False], strict=True):
            if o:
                run.append(h)
            elif run:
                out.append(all(run))
                run = []
    return out
