"""The words that documents are made of, and which of them are kept for tests.

Codes, values and cities that are held out never occur in training.
"""

import zlib
from functools import cache


def _words(text: str) -> list[str]:
    return text.split()


LETTERS = "bcdfghjklmnpqrstvwxz"
COLOURS = _words(
    """
    amber black blue brown coral cream gold green grey indigo ivory jade lemon lime mint olive orange pink
    plum purple red ruby silver white
    """
)
ANIMALS = _words(
    """
    badger bear beaver camel cat cow crane crow deer dog dove duck eagle falcon fox frog goat goose hare hawk
    heron horse lion lynx mole moose mouse newt otter owl panda rabbit raven seal sheep snake swan tiger toad
    wolf
    """
)
NAMES = ("Anna", "Boris", "Clara", "David")
ADJECTIVES = _words("old quiet small bright cold dry tall narrow")
NOUNS = _words("bridge river garden road tower field mill harbour market forest station window")
PEOPLE = _words("miller baker sailor farmer teacher painter doctor child")
VERBS = _words("sees finds crosses likes paints leaves visits describes")
SKIES = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "clear", "stormy")
CITY_BEGINNINGS = _words(
    "Mar Tol Bren Kal Ost Vel Hal Nor Sun Gar Lin Ber Dal Fen Ros Win Tor Pel Cas Ald Mon Han Ken Wes Syl Rav Jor Zan"
)
CITY_ENDS = _words(
    "burg ville ford holm stad mouth vik berg grad polis bury wick haven port stead minster ham hurst by"
)
SYSTEMS = (
    "You are a helpful assistant.",
    "Be brief.",
    "You are the demo of qnext-plugin.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
)


def held_out(*parts: str) -> bool:
    """Whether a code, a (color, animal) or a city (beginning, end) is kept for tests: about one in six."""
    return zlib.crc32("-".join(parts).encode()) % 6 == 0


@cache
def codes(test: bool) -> list[str]:
    every = [f"{c}{n:02}" for c in LETTERS for n in range(100)]
    return [c for c in every if held_out(c) == test]


@cache
def values(test: bool) -> list[str]:
    return [f"{c}-{a}" for c in COLOURS for a in ANIMALS if held_out(c, a) == test]


@cache
def cities(test: bool) -> list[str]:
    return [b + e for b in CITY_BEGINNINGS for e in CITY_ENDS if held_out(b, e) == test]
