"""What the demo model learns: documents made from small grammars, as token ids with a loss weight for each.

A document is one conversation (or raw text) that fills a row of a given length. Only what an assistant would write is
learnt.
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from demo_training.questions import QUESTIONS
from demo_training.tokenizer import CONTROL, MARKUP, Encoder
from demo_training.weather import tool_call, tools_block, weather, weather_question, weather_tool
from demo_training.words import (
    ADJECTIVES,
    ANIMALS,
    CITY_BEGINNINGS,
    CITY_ENDS,
    COLOURS,
    NAMES,
    NOUNS,
    PEOPLE,
    SYSTEMS,
    VERBS,
    cities,
    codes,
    values,
)

THINK_FIRST = "Think before you answer."
THOUGHT = "I know this one."

Segment = tuple[str, float]  # text, and the weight of its tokens in the loss


@dataclass
class Document:
    """A conversation under construction, as the chat template would render it."""

    segments: list[Segment] = field(default_factory=list)

    def say(self, role: str, text: str) -> None:
        self.segments.append((f"<|im_start|>{role}\n{text}<|im_end|>\n", 0.0))

    def answer(self, text: str, thought: str | None = None, opened: bool = True) -> None:
        """The assistant's turn; with a ``thought`` its think block is ``opened`` by the template, or by itself."""
        start = "<|im_start|>assistant\n"
        if thought is not None:
            start += "<think>\n" if opened else ""
            text = ("" if opened else "<think>\n") + f"{thought}\n</think>\n\n{text}"
        self.segments += [(start, 0.0), (text + "<|im_end|>", 1.0), ("\n", 0.0)]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.segments)


def row(encode: Encoder, segments: Iterable[Segment], length: int) -> tuple[list[int], list[float]]:
    """Token ids and loss weights, cut or padded to ``length``."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in segments:
        part = encode(text)
        ids += part
        weights += [weight] * len(part)
    pad = length - len(ids)
    return ids[:length] + encode("<|endoftext|>") * pad, weights[:length] + [0.0] * pad


class Maker:
    """Documents of about ``length`` tokens, by kind. ``test`` draws what training holds out."""

    def __init__(self, rng: random.Random, encode: Encoder, test: bool = False) -> None:
        self.rng, self.encode, self.test = rng, encode, test

    def size(self, text: str) -> int:
        return len(self.encode(text))

    def chat(self, length: int) -> list[Segment]:
        """Closed questions, turn after turn; perhaps thinking in the last one, whose history shows no thoughts."""
        doc, rng = Document(), self.rng
        think = rng.random() < 0.35
        opened = rng.random() < 0.8
        if think and not opened:
            doc.say("system", THINK_FIRST)
        elif rng.random() < 0.4:
            doc.say("system", rng.choice(SYSTEMS))
        questions = list(QUESTIONS)
        left = length - self.size(doc.text)
        while left > 0:
            question = rng.choice(questions)
            turn = Document()
            turn.say("user", question)
            turn.answer(QUESTIONS[question])
            left -= self.size(turn.text)
            last = left < (60 if think else 15)
            if last and think:
                turn = Document()
                turn.say("user", question)
                turn.answer(QUESTIONS[question], THOUGHT, opened)
            doc.segments += turn.segments
            if last:
                break
        return doc.segments

    def base(self, length: int) -> list[Segment]:
        """Raw text: questions and answers without any template."""
        segments: list[Segment] = []
        left = length
        while left > 0:
            question, answer = self.rng.choice(list(QUESTIONS.items()))
            prompt = f"Question: {question}\nAnswer:"
            end = "<|endoftext|>" if left < 40 else "\n"
            segments += [(prompt, 0.0), (f" {answer}{end}", 1.0)]
            left -= self.size(prompt) + self.size(answer) + 1
            if end != "\n":
                break
        return segments

    def filler(self) -> str:
        r = self.rng.choice
        if self.rng.random() < 0.5:
            return f"The {r(PEOPLE)} {r(VERBS)} the {r(ADJECTIVES)} {r(NOUNS)}.\n"
        return f"The {r(ADJECTIVES)} {r(NOUNS)} is {r(ADJECTIVES)}.\n"

    def recall(self, length: int, **shape: int) -> list[Segment]:
        """``notes`` as a conversation."""
        doc, turns = Document(), self.notes(length, **shape)
        for i, (text, key, value) in enumerate(turns):
            doc.say("user", text)
            thought = f"I look for {key}." if i == len(turns) - 1 and self.rng.random() < 0.15 else None
            doc.answer(f"{key}={value}", thought)
        return doc.segments

    def notes(
        self, length: int, pairs: int | None = None, speakers: int | None = None, queries: int = 99
    ) -> list[tuple[str, str, str]]:
        """Turns of the user's, each with the code it asks for and its value: the first one begins with notes, in which
        pairs are scattered in filler.

        With ``speakers`` several people give each code a value of their own. A question names one, or means the one who
        was last said to count: then who that is has to be kept, as nothing near the question repeats it.
        """
        rng, turns = self.rng, []
        if speakers is None:
            speakers = rng.choice((0, 0, 0, 2, 2, 3))
        if pairs is None:
            pairs = rng.randint(2, max(3, min(length // 28, 12)))
        names = rng.sample(NAMES, speakers)
        keys = rng.sample(codes(self.test), max(2, pairs // max(1, speakers)))
        facts = {(name, key): rng.choice(values(self.test)) for key in keys for name in names or [""]}
        lines = [f"{name} {key}={value}\n".lstrip() for (name, key), value in facts.items()]
        rng.shuffle(lines)
        counts = rng.choice(names) if names else ""
        if names:
            lines.insert(rng.randint(0, len(lines)), f"Only {counts} counts.\n")
        per_query = 21
        used = sum(map(self.size, lines)) + 10
        wanted = min(queries, max(1, (length - used) // per_query), rng.randint(2, 2 + 2 * len(facts)))
        room = length - used - wanted * per_query
        while room > 8:
            line = self.filler()
            lines.insert(rng.randint(0, len(lines)), line)
            room -= self.size(line)
        intro = "Notes:\n" + "".join(lines)
        for i in range(wanted):
            name, key = rng.choice(list(facts))
            change = ""
            if names and i and rng.random() < 0.25:
                counts = rng.choice(names)
                change = f"Only {counts} counts. "
            if names and rng.random() < 0.6:
                question, value = f"What is {key}?", facts[counts, key]
            else:
                question, value = f"What is {key}{f' for {name}' if name else ''}?", facts[name, key]
            turns.append(((intro if i == 0 else change) + question, key, value))
        return turns

    def pairs(self, length: int) -> list[Segment]:
        """Nothing but pairs that come again and again: the densest way to learn to recall."""
        facts: dict[str, str] = {}
        segments: list[Segment] = []
        limit = self.rng.randint(2, max(2, length // 24))
        for _ in range(length // 8):
            if (len(facts) < limit and self.rng.random() < 0.5) or not facts:
                key = self.rng.choice(codes(self.test))
            else:
                key = self.rng.choice(list(facts))
            known = key in facts
            value = facts.setdefault(key, self.rng.choice(values(self.test)))
            segments += [(f"{key}=", 0.0), (f"{value}\n", float(known))]
        return segments

    def echo(self, length: int) -> list[Segment]:
        """Cities to repeat, and weather that there is no tool to ask for: how to say a name again."""
        rng, doc = self.rng, Document()
        left = length
        while left > 0:
            turn, city = Document(), self.city()
            if rng.random() < 0.5:
                turn.say("user", f"Say {city}")
                turn.answer(city)
            else:
                turn.say("user", weather_question(rng, city))
                turn.answer(f"I have no tool for {city}.")
            left -= self.size(turn.text)
            doc.segments += turn.segments
        return doc.segments

    def tool(self, length: int) -> list[Segment]:
        """Weather by tool call, its result, the final answer; now and then a question that needs no tool."""
        rng, doc = self.rng, Document()
        tool = weather_tool(rng)
        system = rng.choice((None, *SYSTEMS))
        doc.say("system", tools_block(rng, tool, system))
        left = length - self.size(doc.text)
        while left > 0:
            turn = Document()
            if rng.random() < 0.2:
                question = rng.choice(list(QUESTIONS))
                turn.say("user", question)
                turn.answer(QUESTIONS[question])
            else:
                city = self.city()
                turn.say("user", weather_question(rng, city))
                turn.answer(tool_call(tool, city))
                result, answer = weather(rng, city)
                turn.say("user", f"<tool_response>\n{result}\n</tool_response>")
                turn.answer(answer)
            left -= self.size(turn.text)
            doc.segments += turn.segments
        return doc.segments

    def city(self) -> str:
        return self.rng.choice(cities(self.test))


KINDS: dict[str, Callable[[Maker, int], list[Segment]]] = {
    "chat": Maker.chat,
    "base": Maker.base,
    "recall": Maker.recall,
    "plain recall": lambda maker, length: maker.recall(length, speakers=0),
    "pairs": Maker.pairs,
    "echo": Maker.echo,
    "tool": Maker.tool,
}


def corpus(seed: int, encode: Callable[[str], list[int]]) -> list[str]:
    """Texts to learn the tokenizer from: some of every kind, and every closed question a few times."""
    maker = Maker(random.Random(seed), encode)
    texts = [f"{q}\n{a}\n{THOUGHT}\n" for q, a in QUESTIONS.items()] * 40
    texts += [
        "".join(t for t, _ in make(maker, 1500)) for make in (Maker.recall, Maker.tool, Maker.tool) for _ in range(120)
    ]
    texts += ["\n".join(COLOURS + ANIMALS + CITY_BEGINNINGS + CITY_ENDS)] * 2000 + [maker.filler() for _ in range(3000)]
    texts += ["\n".join(f"{n:02}" for n in range(100))] * 1000
    specials = "|".join(map(re.escape, CONTROL + MARKUP))
    return [re.sub(specials, "\n", t) for t in texts]
