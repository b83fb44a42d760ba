"""What a name can be in a package that is read as source.

An entity is a ``Module``, ``Class``, ``Function``, ``Instance`` (of a class), ``Text`` (a known string), ``Missing``
(it is not there), or None: it cannot be told from the source, and nobody should conclude anything from it.
"""

import ast
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from qnext_plugin.coupling.syntax import bound_names, is_accessor, is_name, last_name, statements, targets


@dataclass(frozen=True, eq=False)
class Module:
    name: str
    file: Path | None
    tree: ast.Module

    @cached_property
    def names(self) -> dict[str, ast.AST]:
        """Each top-level name's definition; the first one where branches define it several times."""
        found: dict[str, ast.AST] = {}
        for node in statements(self.tree.body):
            for name in bound_names(node):
                found.setdefault(name, node)
        return found

    @cached_property
    def stars(self) -> list[ast.ImportFrom]:
        nodes = [node for node in statements(self.tree.body) if isinstance(node, ast.ImportFrom)]
        return [node for node in nodes if node.names[0].name == "*"]

    @cached_property
    def strings(self) -> dict[str, str]:
        """String keys of its dictionaries and members of its lists, for what ``__getattr__`` provides."""
        found: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(key.value, str):
                        text = value.value if isinstance(value, ast.Constant) else ""
                        found[key.value] = text if isinstance(text, str) else ""
            elif isinstance(node, ast.List | ast.Tuple | ast.Set):
                texts = [e.value for e in node.elts if isinstance(e, ast.Constant)]
                found |= {text: "" for text in texts if isinstance(text, str) and text not in found}
        return found


@dataclass(frozen=True, eq=False)
class Class:
    module: Module
    node: ast.ClassDef

    @property
    def name(self) -> str:
        return f"{self.module.name}.{self.node.name}"

    @cached_property
    def own(self) -> dict[str, tuple[ast.AST, ast.FunctionDef | ast.AsyncFunctionDef | None]]:
        """Members of its body, and what its methods assign to ``self`` (with the method)."""
        found: dict[str, tuple[ast.AST, ast.FunctionDef | ast.AsyncFunctionDef | None]] = {}
        methods = []
        for node in statements(self.node.body):
            for name in bound_names(node):
                if name not in found or not is_accessor(node):
                    found[name] = (node, None)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.args.args:
                methods.append(node)
        for method in methods:
            first = method.args.args[0].arg
            for inner in ast.walk(method):
                for target in targets(inner):
                    if isinstance(target, ast.Attribute) and is_name(target.value, first):
                        found.setdefault(target.attr, (inner, method))
        return found


@dataclass(frozen=True, eq=False)
class Function:
    module: Module
    node: ast.FunctionDef | ast.AsyncFunctionDef
    owner: Class | None = None
    bound: bool = False

    @property
    def name(self) -> str:
        return f"{self.owner.name if self.owner else self.module.name}.{self.node.name}"

    @property
    def decorators(self) -> set[str]:
        return {last_name(d.func if isinstance(d, ast.Call) else d) for d in self.node.decorator_list}


@dataclass(frozen=True)
class Instance:
    of: Class


@dataclass(frozen=True)
class Text:
    value: str


@dataclass(frozen=True)
class Missing:
    name: str


Entity = Module | Class | Function | Instance | Text | Missing | None


@dataclass
class Scope:
    """Names that are visible at a place in the source: ``local`` ones, then those of the module."""

    module: Module
    local: dict[str, Entity] = field(default_factory=dict)
