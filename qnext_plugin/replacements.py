"""Replace functions and values of an engine with ours, each for a documented reason.

Each adapter lists its replacements in its ``compat.py``. A replacement is installed once per process, when a model
that needs it is built, and stays in force until the process ends.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from operator import attrgetter
from typing import Any, Literal


@dataclass(frozen=True)
class Feature:
    """A feature that needs replacements. ``is_used`` tells whether a process with an engine's configuration uses it."""

    name: str
    is_used: Callable[[Any], bool]


@dataclass(frozen=True)
class Replacement:
    """One attribute of an engine and our replacement for it.

    ``target`` and ``ours`` are ``"module:name"`` or ``"module:Owner.name"``; both are imported at installation. A
    target ``"module:NAMES[key]"`` is an entry of a mapping, and the entry need not exist. ``kind`` describes ``ours``:

    - ``replace``: a function that is called with the target's arguments, or a class that replaces a class.
    - ``around``: a function that is called with the original first, then with the target's arguments.
    - ``set``: a value.

    ``why`` describes what goes wrong without the replacement, ``until`` when it can be removed. ``parameters`` are
    the parameters of the target that ``ours`` relies on.
    """

    feature: Feature
    target: str
    ours: str
    why: str
    until: str
    kind: Literal["replace", "around", "set"] = "replace"
    parameters: tuple[str, ...] = ()


Put = Callable[[Replacement, Any], None]

IN_FORCE: dict[str, Replacement] = {}
"""The replacements that are installed in this process, by target."""


def install(
    replacements: Iterable[Replacement], config: Any, engine: str, version: str, put: Put | None = None
) -> None:
    """Install the replacements that a process with ``config`` needs and that are not installed yet.

    ``put`` is the engine's own way to replace a function or class, if it has one. Raises ``RuntimeError`` if a target
    is not what our replacement was written for.
    """
    for replacement in replacements:
        if replacement.target not in IN_FORCE and replacement.feature.is_used(config):
            _install(replacement, engine, version, put or _wrap)


def _install(replacement: Replacement, engine: str, version: str, put: Put) -> None:
    if problem := problem_with(replacement):
        raise RuntimeError(
            f"{engine} {version}: {replacement.target} {problem}; qnext-plugin has to replace it for "
            f"{replacement.feature.name}, because {replacement.why}. Install a version of {engine} that it is tested "
            f"with (`qnext doctor` prints the range), or set QNEXT_DISABLE=1 to serve {engine}'s own model"
        )
    ours = resolve(replacement.ours)
    if replacement.kind == "set":
        _set(replacement.target, ours)
    else:
        put(replacement, ours)
    IN_FORCE[replacement.target] = replacement


def problem_with(replacement: Replacement) -> str:
    """Return why the target cannot be replaced, worded to follow its name; empty if it can be replaced."""
    try:
        original = resolve(replacement.target)
    except (ImportError, AttributeError) as e:
        return f"does not exist ({e})"
    except KeyError:
        return ""  # an entry that we add
    parameters: Mapping[str, Any] = inspect.signature(original).parameters if replacement.parameters else {}
    missing = [name for name in replacement.parameters if name not in parameters]
    return f"has no parameter {', '.join(missing)}, only {', '.join(parameters) or 'none'}" if missing else ""


def resolve(name: str) -> Any:
    """Return the object named ``"module:Owner.name"`` or ``"module:NAMES[key]"``; raise if it does not exist."""
    owner, last, is_key = _parts(name)
    return owner[last] if is_key else getattr(owner, last)


def _parts(name: str) -> tuple[Any, str, bool]:
    """Split ``name`` into the object that owns the last part, the last part itself, and whether that is a key."""
    module, _, path = name.partition(":")
    path, bracket, key = path.partition("[")
    owners, _, last = path.rpartition(".")
    owner: Any = import_module(module)
    owner = attrgetter(owners)(owner) if owners else owner
    return (getattr(owner, last), key.removesuffix("]"), True) if bracket else (owner, last, False)


def _set(target: str, value: Any) -> None:
    owner, last, is_key = _parts(target)
    if is_key:
        owner[last] = value
    else:
        setattr(owner, last, value)


def _wrap(replacement: Replacement, ours: Any) -> None:
    owner, name, _ = _parts(replacement.target)
    found = inspect.getattr_static(owner, name)
    is_bound = isinstance(found, classmethod | staticmethod)
    original = found.__func__ if is_bound else found

    @wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs) if replacement.kind == "around" else ours(*args, **kwargs)

    setattr(owner, name, type(found)(replaced) if is_bound else replaced)
