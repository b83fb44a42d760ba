"""What to do about the engine's version and platform: serve, warn and serve, or leave its own model in place."""

from dataclasses import dataclass
from functools import cache
from importlib import import_module

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from qnext_plugin import __version__


@dataclass(frozen=True)
class Verdict:
    """Whether our model serves, and a ``message`` for the user, which is empty within the tested range."""

    serves: bool
    message: str = ""


def is_tested(version: str, tested: str) -> bool:
    """Whether ``version`` is in a range such as ``>=0.32,<0.34``; local builds count, what is no version does not."""
    try:
        return SpecifierSet(tested).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def refuse_platform(engine: str, platform: str) -> Verdict:
    """The verdict on an accelerator that the adapters have no code for, such as one of ROCm, XPU or NPU."""
    return Verdict(
        False,
        f"qnext-plugin {__version__} serves on CUDA and on CPUs, and the platform is {platform}. "
        f"{engine}'s own model serves",
    )


@cache
def judge(engine: str, version: str, tested: str, modules: tuple[str, ...]) -> Verdict:
    """Serve within the tested range, where nothing is imported.

    Outside of it serve with a warning if ``modules``, which hold what serves, can be imported beside this engine.
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
