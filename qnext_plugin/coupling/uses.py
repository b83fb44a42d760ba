"""Walks a module of ours and looks up in the engine's source everything of the engine's that it uses."""

import ast
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from qnext_plugin.coupling.entities import Class, Entity, Function, Instance, Missing, Module, Scope, Text
from qnext_plugin.coupling.signature import Parameters, describe, signature
from qnext_plugin.coupling.source import Source, imported

TORCH_OPERATORS = {"aten", "mkldnn", "onednn", "prims", "quantized"}


@dataclass
class Report:
    """``problems``: what is missing or does not fit, each with file and line of ours. ``facts``: every engine name in
    use, with what it looks like there, for a comparison of two versions."""

    problems: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)


def mentioned(directory: Path, names: set[str]) -> set[str]:
    """Those of ``names`` that stand anywhere in a package but as the name of a definition."""
    found: set[str] = set()
    if not names:
        return found
    pattern = re.compile(rb"(?<!def )\b(?:%s)\b" % "|".join(sorted(names)).encode())
    for folder, _, files in os.walk(directory, followlinks=True):
        for file in files:
            if file.endswith(".py") and found != names:
                found |= {match.decode() for match in pattern.findall(Path(folder, file).read_bytes())}
    return found


class Uses(ast.NodeVisitor):
    """Walks one module of ours in the order it runs, and looks everything of the engine's up."""

    def __init__(self, source: Source, module: Module, engine: str, report: Report) -> None:
        self.source, self.engine, self.report = source, engine, report
        self.scope = Scope(module)
        self.offered: dict[str, str] = {}
        self._patched: dict[str, Class] = {}
        self._owner: Class | None = None
        self._guarded = 0
        self._called = set[ast.expr]()

    # What is bound to which name

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            name = alias.asname or alias.name.partition(".")[0]
            self.scope.local[name] = imported(self.source, node, name)
            if self._is_engine(alias.name):
                self._found(node, self.source.resolve(alias.name), alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            known = node.module is not None and self.source.knows(node.module)
            module = self.source.module(node.module) if known and node.module else None
            entity = self.source.member(module, alias.name) if module else Missing(name) if known else None
            self.scope.local[alias.asname or alias.name] = None if isinstance(entity, Missing) else entity
            if self._is_engine(name):
                self._found(node, entity, name)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for name, value in zip(target.elts, node.value.elts, strict=False):
                    self._bind(name, self.source.infer(value, self.scope))
            else:
                self._bind(target, self.source.infer(node.value, self.scope))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        entity = self.source.annotated(node.annotation, self.scope)
        self._bind(node.target, entity or self.source.infer(node.value, self.scope))

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, None)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._bind(node.target, None)
        self.generic_visit(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        with_arguments = Scope(self.scope.module, self.scope.local | {a.arg: None for a in node.args.args})
        outer, self.scope = self.scope, with_arguments
        self.generic_visit(node)
        self.scope = outer

    def visit_Assert(self, node: ast.Assert) -> None:
        self.generic_visit(node)
        test = node.test
        if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "isinstance":
            cls = self.source.infer(test.args[1], self.scope)
            self._bind(test.args[0], Instance(cls) if isinstance(cls, Class) else None)

    def _bind(self, target: ast.expr, entity: Entity) -> None:
        if isinstance(target, ast.Name):
            self.scope.local[target.id] = None if isinstance(entity, Missing) else entity
        elif isinstance(target, ast.Tuple | ast.List):
            for element in target.elts:
                self._bind(element, None)

    # Where names live

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for part in (*node.bases, *node.keywords, *node.decorator_list):
            self.visit(part)
        cls = Class(self.scope.module, node)
        if not self.scope.local.get(node.name):
            self.scope.local[node.name] = cls
        self._check_class(cls)
        outer, self._owner = self._owner, cls
        for statement in node.body:
            self.visit(statement)
        self._owner = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults, *node.decorator_list):
            if default is not None:
                self.visit(default)
        self.scope.local.setdefault(node.name, None)
        parameters = self.source.parameters(node, self._owner)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            annotated = self.source.annotated(argument.annotation, self.scope)
            parameters[argument.arg] = parameters[argument.arg] or annotated
            if argument.annotation is not None:
                self.visit(argument.annotation)
        if node.name in self._patched and "self" in parameters:
            parameters["self"] = Instance(self._patched[node.name])
        outer, self.scope = self.scope, Scope(self.scope.module, self.scope.local | parameters)
        owner, self._owner = self._owner, None
        self._find_patches(node)
        for statement in node.body:
            self.visit(statement)
        self.scope, self._owner = outer, owner

    def visit_Try(self, node: ast.Try) -> None:
        caught = {n.id for h in node.handlers if h.type for n in ast.walk(h.type) if isinstance(n, ast.Name)}
        guards = bool(caught & {"ImportError", "ModuleNotFoundError", "AttributeError"})
        self._guarded += guards
        for statement in node.body:
            self.visit(statement)
        self._guarded -= guards
        for part in (*node.handlers, *node.orelse, *node.finalbody):
            self.visit(part)

    def _find_patches(self, function: ast.FunctionDef) -> None:
        """``replace(EngineClass, "method", local_function)``: that function's ``self`` is the engine's object."""
        nodes = list(ast.walk(function))
        self._guarded += 1  # each is visited again in its place
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                self.visit_ImportFrom(node)
        self._guarded -= 1
        for node in nodes:
            if isinstance(node, ast.Call) and len(node.args) > 2 and isinstance(node.args[2], ast.Name):
                owner, name = (self.source.infer(argument, self.scope) for argument in node.args[:2])
                if isinstance(owner, Class) and isinstance(name, Text):
                    self._patched[node.args[2].id] = owner

    # What is looked up

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        operator = re.fullmatch(r"torch\.ops\.(\w+)\.(\w+)", ast.unparse(node))
        if operator:
            self._check_operator(node, operator[1], operator[2])
        base = self.source.infer(node.value, self.scope)
        if self._owned(base):
            self._found(
                node, self.source.member(base, node.attr, node in self._called), self._member_name(base, node.attr)
            )

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self._check_text(node, node.value)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        text = self.source.infer(node, self.scope)
        if isinstance(text, Text):
            self._check_text(node, text.value)
        else:
            self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # else a docstring
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self._called.add(node.func)
        self.generic_visit(node)
        func = self.source.infer(node.func, self.scope)
        if isinstance(func, Function | Class) and self._owned(func):
            accepted = signature(self.source, func)
            if accepted is not None:
                self._problems(node, (f"{_name(func)}: {fault}" for fault in accepted.faults(node)))
        if len(node.args) > 1:
            owner, name = (self.source.infer(argument, self.scope) for argument in node.args[:2])
            if self._owned(owner) and isinstance(name, Text) and name.value.isidentifier():
                self._check_named(node, owner, name.value)

    def _check_named(self, node: ast.Call, owner: Entity, name: str) -> None:
        """``getattr(owner, "name")`` and the like; a patch also lists the parameters that it relies on."""
        if isinstance(node.func, ast.Name) and len(node.args) > {"hasattr": 1, "getattr": 2}.get(node.func.id, 9):
            return  # it copes where there is none
        target = self.source.member(owner, name)
        self._found(node, target, f"{_name(owner)}.{name}", with_body=True)
        if isinstance(target, Function):
            accepted = {a.arg for a in (*target.node.args.args, *target.node.args.kwonlyargs)}
            tuples = [a.elts for a in node.args[2:] if isinstance(a, ast.Tuple)]
            named = [str(ast.literal_eval(n)) for elements in tuples for n in elements if _is_text(n)]
            self._problems(node, (f"{target.name} has no parameter {n!r}" for n in named if n not in accepted))

    def _check_text(self, node: ast.AST, text: str) -> None:
        if re.fullmatch(rf"{self.engine}(\.\w+){{2,}}", text):
            self._found(node, self.source.resolve(text), text, with_body=True)

    def _check_operator(self, node: ast.AST, namespace: str, name: str) -> None:
        if namespace not in TORCH_OPERATORS and not mentioned(self.source.packages[self.engine], {name}):
            self._problems(node, [f"torch.ops.{namespace}.{name}: {self.engine} does not mention it"])

    def _check_class(self, cls: Class) -> None:
        bases, _ = self.source.bases(cls)
        theirs = [base for base in bases if self._is_engine(base.name)]
        implemented = {n for base in bases for n, (definition, _) in base.own.items() if not _is_abstract(definition)}
        for base in theirs:
            demanded = [n for n, (definition, _) in base.own.items() if _is_abstract(definition)]
            missing = [n for n in demanded if n not in implemented]
            self._problems(cls.node, (f"{base.name} demands {name!r}" for name in missing))
        for name, (node, method) in cls.own.items():
            if method is not None or name.startswith("__"):
                continue
            overridden = next((base for base in theirs if name in base.own), None)
            if overridden is None:
                if not name.startswith("_") or theirs:
                    self.offered.setdefault(name, f"{self._where(node)} {cls.node.name}")
                continue
            original = overridden.own[name][0]
            self._found(node, self.source.member(overridden, name), f"{overridden.name}.{name}", with_body=True)
            if isinstance(node, ast.FunctionDef) and isinstance(original, ast.FunctionDef):
                ours, asked = Parameters.of(node, True), Parameters.of(original, True)
                self._problems(node, (f"{overridden.name}.{name}: {f}" for f in ours.lacks(asked)))

    # What is reported

    def _is_engine(self, name: str) -> bool:
        return name.partition(".")[0] == self.engine

    def _owned(self, entity: Entity) -> bool:
        """Whether it is the engine's, or a class of ours that has something of the engine's."""
        if entity is None or isinstance(entity, Text | Missing):
            return False
        if isinstance(entity, Class | Instance):
            cls = entity.of if isinstance(entity, Instance) else entity
            return any(self._is_engine(base.name) for base in self.source.bases(cls)[0])
        return self._is_engine(_name(entity))

    def _member_name(self, entity: Entity, name: str) -> str:
        """Where a member is defined, or ""  where that is not in the engine."""
        if isinstance(entity, Class | Instance):
            cls = entity.of if isinstance(entity, Instance) else entity
            found = self.source.find(cls, name)
            cls = found[0] if found else cls
            return f"{cls.name}.{name}" if self._is_engine(cls.name) else ""
        return f"{_name(entity)}.{name}"

    def _found(self, node: ast.AST, entity: Entity, name: str, with_body: bool = False) -> None:
        if isinstance(entity, Missing):
            self._problems(node, [f"{entity.name} does not exist"])
        elif name and not self._guarded:
            described = describe(self.source, entity)
            if with_body and isinstance(entity, Function | Class):
                described += f" #{hashlib.sha256(ast.dump(entity.node).encode()).hexdigest()[:8]}"
            if len(described) >= len(self.report.facts.get(name, "")):
                self.report.facts[name] = described

    def _problems(self, node: ast.AST, problems: Iterable[str]) -> None:
        if not self._guarded:
            for problem in problems:
                line = f"{self._where(node)}: {problem}"
                if line not in self.report.problems:
                    self.report.problems.append(line)

    def _where(self, node: ast.AST) -> str:
        file = self.scope.module.file
        assert file is not None
        return f"{self.scope.module.name.partition('.')[0]}/{file.name}:{getattr(node, 'lineno', 1)}"


def _name(entity: Entity) -> str:
    if isinstance(entity, Instance):
        return entity.of.name
    assert isinstance(entity, Module | Class | Function)
    return entity.name


def _is_abstract(node: ast.AST) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return any("abstractmethod" in ast.unparse(d) for d in decorators)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
