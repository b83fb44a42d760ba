"""What a function or class can be called with, from its definition, and whether a call fits."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from qnext_plugin.coupling.entities import Class, Entity, Function, Instance, Module
from qnext_plugin.coupling.source import Source

_DATACLASSES = {"dataclass", "config"}
_RECORDS = {"NamedTuple", "Struct", "BaseModel"}


@dataclass(frozen=True)
class Parameters:
    """``positional`` ones in order; of these and of ``keyword_only`` those in ``required`` have no default."""

    positional: tuple[str, ...]
    keyword_only: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()
    any_positional: bool = False
    any_keyword: bool = False
    positional_only: frozenset[str] = frozenset()

    @classmethod
    def of(cls, node: ast.FunctionDef | ast.AsyncFunctionDef, bound: bool) -> "Parameters":
        a = node.args
        every = [p.arg for p in (*a.posonlyargs, *a.args)]
        needed = every[: len(every) - len(a.defaults)]
        needed += [p.arg for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True) if d is None]
        first = every[:1] if bound else []
        return cls(
            tuple(every[len(first) :]),
            tuple(p.arg for p in a.kwonlyargs),
            frozenset(needed) - set(first),
            a.vararg is not None,
            a.kwarg is not None,
            frozenset(p.arg for p in a.posonlyargs),
        )

    def faults(self, call: ast.Call) -> Iterator[str]:
        """Why the call does not fit."""
        starred = any(isinstance(a, ast.Starred) for a in call.args)
        expanded = any(k.arg is None for k in call.keywords)
        given = len([a for a in call.args if not isinstance(a, ast.Starred)])
        named = {k.arg for k in call.keywords if k.arg is not None}
        if given > len(self.positional) and not self.any_positional:
            yield f"takes {len(self.positional)} positional arguments, we give {given}"
        if not self.any_keyword:
            known = {*self.positional, *self.keyword_only} - self.positional_only
            for name in sorted(named - known):
                yield f"takes no argument {name!r}"
        if not starred and not expanded:
            for name in sorted(self.required - named - set(self.positional[:given])):
                yield f"needs an argument {name!r}, which we do not give"

    def lacks(self, asked: "Parameters") -> Iterator[str]:
        """What a caller who goes by ``asked`` may pass and this does not take."""
        if not self.any_positional and not self.any_keyword:
            extra = [n for n in asked.positional[len(self.positional) :] if n not in self.keyword_only]
            if extra:
                yield f"is called with {', '.join(extra)}, which ours does not take"
        for name in asked.keyword_only:
            if name not in (*self.positional, *self.keyword_only) and not self.any_keyword:
                yield f"is called with {name}, which ours does not take"
        for name in sorted(self.required - {*asked.positional, *asked.keyword_only}):
            if asked.any_positional or asked.any_keyword:
                continue
            if name in self.keyword_only or self.positional.index(name) >= len(asked.positional):
                yield f"is not called with {name}, which ours needs"


def signature(source: Source, entity: Function | Class) -> Parameters | None:
    """None where it cannot be told."""
    if isinstance(entity, Function):
        return None if entity.decorators & {"overload", "singledispatch"} else Parameters.of(entity.node, entity.bound)
    for name in ("__init__", "__new__"):
        found = source.find(entity, name)
        if found is not None:
            own = found[1]
            return Parameters.of(own, True) if isinstance(own, ast.FunctionDef) else None
    return _fields(source, entity)


def _fields(source: Source, cls: Class) -> Parameters | None:
    """The ``__init__`` that a dataclass or a similar decorator or base makes of annotated names."""
    bases, unknown = source.bases(cls)
    names: dict[str, bool] = {}
    keyword_only = False
    for base in reversed(bases):
        decorators = [d.func if isinstance(d, ast.Call) else d for d in base.node.decorator_list]
        made = {ast.unparse(d).rpartition(".")[2] for d in decorators} & _DATACLASSES
        records = {ast.unparse(b).rpartition(".")[2] for b in base.node.bases} & _RECORDS
        unknown -= records
        if not made and not records:
            continue
        options = [k for d in base.node.decorator_list if isinstance(d, ast.Call) for k in d.keywords]
        keyword_only = keyword_only or any(k.arg == "kw_only" for k in [*options, *base.node.keywords])
        for node in base.node.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                text = ast.unparse(node.annotation)
                if not text.startswith(("ClassVar", "typing.ClassVar")) and "init=False" not in ast.unparse(node):
                    names[node.target.id] = node.value is None
    if not names or unknown:
        return None
    required = frozenset(name for name, needed in names.items() if needed)
    return Parameters((), tuple(names), required) if keyword_only else Parameters(tuple(names), (), required)


def describe(source: Source, entity: Entity) -> str:
    """One line to compare between versions."""
    if isinstance(entity, Function):
        returns = f" -> {ast.unparse(entity.node.returns)}" if entity.node.returns else ""
        return f"({ast.unparse(entity.node.args)}){returns}"
    if isinstance(entity, Class):
        found = source.find(entity, "__init__")
        if found is not None and isinstance(found[1], ast.FunctionDef):
            return f"class({ast.unparse(found[1].args)})"
        fields = _fields(source, entity)
        return f"class({', '.join((*fields.positional, *fields.keyword_only))})" if fields else "class"
    if isinstance(entity, Instance):
        return entity.of.name
    return "module" if isinstance(entity, Module) else "there"
