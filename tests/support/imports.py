"""What our modules import, read from their source."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("qnext_plugin", "vllm_ext", "sglang_ext")


@cache
def modules() -> dict[str, ast.Module]:
    """Each module's syntax tree by the module's name."""
    found = {}
    for file in sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(file.read_text())
    return found


def statements(node: ast.AST, lazy: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements below ``node``: all, or without ``lazy`` those that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif lazy or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            typing_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            if lazy or not typing_only:
                yield from statements(child, lazy)


@cache
def imported(module: str, lazy: bool) -> frozenset[str]:
    """What ``module`` imports: our modules, and of others whatever has a name (``a.b`` for ``from a import b``)."""
    found = set()
    for statement in statements(modules()[module], lazy):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        else:
            assert not statement.level, f"{module} imports a relative name"
            names = {f"{statement.module}.{alias.name}" for alias in statement.names}
            found |= {str(statement.module) if is_attribute(name) else name for name in names}
    return frozenset(found - {module})


def is_attribute(name: str) -> bool:
    """Whether ``name`` is something in a module of ours."""
    return name.split(".")[0] in PACKAGES and name not in modules()


def reachable(starts: Iterable[str]) -> set[str]:
    """Modules that are imported with ``starts``, packages around them included; others' modules by name alone."""
    found, waiting = set[str](), list(starts)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            parts = name.split(".")
            waiting += [".".join(parts[:end]) for end in range(1, len(parts))]
            waiting += imported(name, lazy=False) if name in modules() else ()
    return found


def cycles(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Paths in ``graph`` that return to where they began, at least one of each knot."""
    found, done = [], set[str]()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            found.append(" -> ".join((*path[path.index(name) :], name)))
        elif name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
    return found
