"""Check that the classes that serve are ours, or the engine's own if those were requested."""

import re
from collections.abc import Collection
from pathlib import Path

from qnext_plugin.engines.process import EngineFailed

_LINE = re.compile(r"qnext-plugin \S+: (\w+)\S* is served by ([\w.]+)")


def native_environment(native: bool) -> dict[str, str]:
    """Return the environment variable that makes an engine serve its own model or ours, whatever is set now."""
    return {"QNEXT_DISABLE": str(int(native))}


def check_modules(modules: Collection[str], engine: str, native: bool, log: Path) -> None:
    """Raise ``EngineFailed`` unless ``modules``, those of the serving classes, belong to the expected package."""
    expected = f"{engine}." if native else f"{engine}_ext."
    if not modules or not all(module.startswith(expected) for module in modules):
        raise EngineFailed(f"{sorted(modules) or 'no classes'} serve, expected classes of {expected}*", log)


def logged_classes(log: Path) -> dict[str, str]:
    """Return the module of each of our serving classes by the class's name, read from an engine's log."""
    return dict(_LINE.findall(log.read_text(errors="replace")))


def check_log(engine: str, native: bool, log: Path) -> dict[str, str]:
    """Return ``logged_classes`` after checking them; there must be none if the engine's own model is to serve."""
    classes = logged_classes(log)
    if classes or not native:
        check_modules(classes.values(), engine, native, log)
    return classes
