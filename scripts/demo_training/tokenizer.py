"""A byte-level BPE whose pieces keep a name the same tokens wherever it stands."""

import re
from collections.abc import Iterable
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 1024
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# A capital letter or a code starts a piece of its own, so that a name is the same tokens wherever it stands.
PIECES = r"\n| (?=[A-Z]|[a-z][0-9])| ?[a-z]+|[A-Z][a-z]*|[0-9]{1,2}| ?[^\sA-Za-z0-9]+|\s+"


class Encoder:
    """``tokenizer.encode`` with every piece remembered: the text repeats itself, so this is many times faster."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._specials = re.compile("(" + "|".join(map(re.escape, CONTROL + MARKUP)) + ")")
        self._encode = cache(lambda piece: tokenizer.encode(piece, add_special_tokens=False).ids)

    def __call__(self, text: str) -> list[int]:
        parts = self._specials.split(text)  # every second one is a special token
        pieces = (p for n, part in enumerate(parts) for p in ([part] if n % 2 else re.findall(PIECES, part)))
        return [i for piece in pieces for i in self._encode(piece)]


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE over ``PIECES``; control and markup tokens follow the learnt ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL) - len(MARKUP),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP])
    return tokenizer
