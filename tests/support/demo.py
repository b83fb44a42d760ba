"""What the demo checkpoint is asked and what it should answer, none of it seen in training but the closed questions.

Knows no engine. The generators are the training's own, drawing what training holds out.
"""

import random
import re
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qnext_plugin.checkpoint.make_demo import DIRECTORY
from qnext_plugin.engines.config import MAX_MODEL_LEN
from qnext_plugin.verify.scenarios import Scenario

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

from demo_training.data import THOUGHT as THOUGHT
from demo_training.data import Maker
from demo_training.questions import QUESTIONS
from demo_training.tokenizer import Encoder
from demo_training.words import cities

Messages = list[dict[str, Any]]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass(frozen=True)
class Prompt:
    """A conversation and the text that the assistant should say next. ``options`` go to the chat template."""

    messages: Messages
    answer: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ids(self) -> tuple[int, ...]:
        text = tokenizer().apply_chat_template(
            self.messages, add_generation_prompt=True, tokenize=False, **self.options
        )
        return encode(text)

    @property
    def answer_ids(self) -> tuple[int, ...]:
        return encode(self.answer + "<|im_end|>")


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DIRECTORY)


def encode(text: str) -> tuple[int, ...]:
    return tuple(tokenizer().encode(text, add_special_tokens=False))


def questions() -> list[Prompt]:
    return [Prompt([_user(question)], answer) for question, answer in QUESTIONS.items()]


def recall(length: int, count: int, early: bool = False) -> list[tuple[Prompt, Prompt]]:
    """``count`` notes of about ``length`` tokens, each with a first question and a second one, which follows it.

    There are six pairs, of which no two share a number or a color: those the model mixes up now and then. ``early``:
    the second question is for one in the first half, all of which is in the part that a prefix-cache hit restores.
    """
    maker = Maker(random.Random(length), Encoder(tokenizer().backend_tokenizer), test=True)
    out: list[tuple[Prompt, Prompt]] = []
    while len(out) < count:
        (notes, *first), (question, *second) = maker.notes(length, pairs=6, speakers=0, queries=2)
        pairs = re.findall(r"^\w(\d\d)=(\w+)-", notes, re.MULTILINE)
        if any(len(set(parts)) < len(parts) for parts in zip(*pairs, strict=True)):
            continue
        if early and notes.index("\n" + "=".join(second)) > len(notes) / 2:
            continue
        said, answer = [_user(notes)], "=".join(first)
        later = [*said, {"role": "assistant", "content": answer}, _user(question)]
        out.append((Prompt(said, answer), Prompt(later, "=".join(second))))
    return out


def tool_calls() -> list[Prompt]:
    """One question for every other held-out city. The answer is the city alone."""
    forms = ("What is the weather in {}?", "How is the weather in {} today?", "Please tell me the weather in {}.")
    return [
        Prompt([_user(forms[i % len(forms)].format(city))], city, {"tools": [WEATHER]})
        for i, city in enumerate(cities(test=True)[::2])
    ]


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


# For an engine without a server: notes and a question, then another question, which hits the prefix cache.
RECALLED = recall(MAX_MODEL_LEN - 100, 12, early=True)
RECALL = Scenario(
    tuple(tuple(prompt.ids for prompt in turn) for turn in zip(*RECALLED, strict=True)),
    max_tokens=(8,),
    hits=tuple((1, i) for i in range(len(RECALLED))),
)
