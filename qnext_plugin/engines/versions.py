"""Decide by the engine's version and platform whether to serve, to serve with a warning, or not to serve."""

from dataclasses import dataclass
from functools import cache
from importlib import import_module

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from qnext_plugin import __version__


@dataclass(frozen=True)
class Verdict:
    """A decision whether our model serves, with a ``message`` for the user that is empty within the tested range."""

    serves: bool
    message: str = ""


def is_tested(version: str, tested: str) -> bool:
    """Return whether ``version`` is in a range such as ``>=0.32,<0.34``.

    Local builds count; invalid versions do not.
    """
    try:
        return SpecifierSet(tested).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def refuse_platform(engine: str, platform: str) -> Verdict:
    """Return the verdict for a platform that the adapters have no code for, such as ROCm, XPU or NPU."""
    return Verdict(
        False,
        f"qnext-plugin {__version__} serves on CUDA and on CPUs, and the platform is {platform}. "
        f"{engine}'s own model serves",
    )


@cache
def judge(engine: str, version: str, tested: str, modules: tuple[str, ...]) -> Verdict:
    """Decide whether to serve: yes within the tested range, without importing anything.

    Outside of it, the verdict is to serve with a warning if the serving ``modules`` can be imported with this engine.
    """
    if is_tested(version, tested):
        return Verdict(True)
    found = f"qnext-plugin {__version__} is tested with {engine} {tested}, and this is {version}"
    for module in modules:
        try:
            import_module(module)
        except Exception as e:
            return Verdict(
                False,
                f"{found}, with which {module} cannot be imported ({type(e).__name__}: {e}). {engine}'s own model "
                f"serves; install a tested {engine} to have this one",
            )
    return Verdict(
        True,
        f"{found}. Its modules can be imported, but what they call may have changed, so answers may be wrong. Compare "
        f"some with QNEXT_DISABLE=1, which gives {engine}'s own model, or install a tested {engine}",
    )
