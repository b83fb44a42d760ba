"""The README and the pages of docs/: their links, anchors and commands."""

import re
import shlex
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
CONTINUATION = re.compile(r" *\\\n *")
PLACEHOLDERS = {"N": "2", "N+1": "3", "2N+1": "5"}
"""Numbers for the names that stand for them in a command."""


def name(document: Path) -> str:
    return str(document.relative_to(ROOT))


def prose(document: Path) -> str:
    """Return the text without its code blocks."""
    return FENCE.sub("", document.read_text())


def links(document: Path) -> list[str]:
    return LINK.findall(CODE.sub("", prose(document)) + "".join(re.findall(r"!\[[^\]]*\]\(\S+\)", prose(document))))


def anchors(document: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub and the site make them."""
    seen, found = Counter[str](), set()
    for heading in re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        found.add(f"{slug}_{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def commands(document: Path, *program: str) -> list[list[str]]:
    """Return the arguments of each command of ``program`` in the code blocks, and in code inside the text.

    Variables before a command, and what a shell does with its output, are left out.
    """
    text = document.read_text()
    lines = [line for block in FENCE.findall(text) for line in CONTINUATION.sub(" ", block).splitlines()]
    lines += CODE.findall(prose(document))
    found = []
    for line in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # an apostrophe in text that is no command
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if tuple(words[: len(program)]) == program:
            found.append([PLACEHOLDERS.get(word, word) for word in words[len(program) :]])
    return found
