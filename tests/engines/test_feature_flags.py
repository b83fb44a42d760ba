"""Every flag of the engine that touches caches, states, drafts, experts or sampling has a row in docs/features.md."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.engine_parser import parser
from tests.support.features import ASIDE, FEATURES, NO_GROUPS
from tests.support.installed import ENGINE


def flags():
    """The engine's flags without their dashes, by the group in which it has them."""
    if ENGINE == "vllm":
        groups = parser()._action_groups
        return {group.title: [name(action) for action in group._group_actions] for group in groups}
    from sglang.srt.server_args import ServerArgs

    found = {}
    for action in parser()._actions:
        space = ServerArgs._NS_BY_FIELD.get(action.dest, "other").split(".")[-1]
        found.setdefault(space, []).append(name(action))
    return found


def name(action):
    """The one of an action's options that is also its name in the engine, or the first."""
    options = [option[2:] for option in action.option_strings if option.startswith("--")] or [action.dest]
    same = action.dest.replace("_", "-")
    return same if same in options else options[0]


def test_every_flag_has_a_row():
    in_rows = {flag for row in FEATURES for flag in row.flags(ENGINE)}
    found = flags()
    there = {flag for group in found.values() for flag in group}
    gone = (in_rows | set(ASIDE[ENGINE].split())) - there
    assert not gone, f"which the engine has not: {' '.join(sorted(gone))}"
    asked = {flag for group, some in found.items() if group not in NO_GROUPS[ENGINE] for flag in some}
    missing = asked - in_rows - set(ASIDE[ENGINE].split())
    assert not missing, f"without a row in tests/support/features: {' '.join(sorted(missing))}"


@pytest.mark.parametrize("row", [row for row in FEATURES if row.cell(ENGINE).message], ids=lambda row: row.name)
def test_a_refusal_is_in_the_source(row):
    package, _, file = row.cell(ENGINE).source.partition("/")
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    assert row.cell(ENGINE).message in (Path(spec.origin).parent / file).read_text()
