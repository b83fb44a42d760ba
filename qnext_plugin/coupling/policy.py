"""What to do about the engine's version: serve, warn and serve, or leave the engine's own model in place."""

from dataclasses import dataclass
from functools import cache

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from qnext_plugin import __version__


@dataclass(frozen=True)
class Verdict:
    """``message`` is for the user, empty within the tested range; ``problems`` are what the coupling check found."""

    serves: bool
    message: str = ""
    problems: tuple[str, ...] = ()


def is_tested(version: str, tested: str) -> bool:
    """Whether ``version`` is in a range such as ``>=0.32,<0.34``; local builds count, what is no version does not."""
    try:
        return SpecifierSet(tested).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


@cache
def judge(adapter: str, engine: str, version: str, tested: str) -> Verdict:
    """Within the range: serve. Outside: serve with a warning where the installed engine has all that we use of it."""
    if is_tested(version, tested):
        return Verdict(True)
    from qnext_plugin.coupling import check_installed

    found = f"qnext-plugin {__version__} is tested with {engine} {tested}, and this is {version}"
    problems = tuple(check_installed(adapter, engine).problems)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        return Verdict(
            False,
            f"{found}, which lacks what it uses: {'; '.join(problems[:3])}{more}. {engine}'s own model serves; "
            f"install a tested {engine} to have this one",
            problems,
        )
    return Verdict(
        True,
        f"{found}: every name it uses is there, but what one does may have changed, so answers may be wrong. Compare "
        f"some with QNEXT_DISABLE=1, which gives {engine}'s own model, or install a tested {engine}",
    )
