"""Commands and flags of the engine in the README and docs/, by the engine's own parser."""

import re

import pytest

from tests.support.documents import CODE, DOCUMENTS, ROOT, commands, name, prose
from tests.support.engine_parser import COMMAND, parser
from tests.support.installed import ENGINE

FOUND = [(document, words) for document in DOCUMENTS for words in commands(document, *COMMAND) if words]
REMOVED = {"--rope-scaling"}


@pytest.mark.parametrize(("document", "words"), [pytest.param(d, w, id=f"{name(d)}: {' '.join(w)}") for d, w in FOUND])
def test_the_engine_takes_a_command(document, words):
    parser().parse_args(words)


def test_the_engine_has_the_flags_of_its_page():
    known = {option for action in parser()._actions for option in action.option_strings}
    code = CODE.findall(prose(ROOT / "docs" / f"{ENGINE}.md"))
    named = {flag for span in code for flag in re.findall(r"(?<!\S)--[a-z][\w-]+", span) if "qnext" not in span}
    assert len(named) > 10
    assert not named - known - REMOVED
