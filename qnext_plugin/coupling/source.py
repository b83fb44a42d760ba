"""Python packages read as source: what a name is, which members a class has. Nothing is imported."""

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from qnext_plugin.coupling.entities import Class, Entity, Function, Instance, Missing, Module, Scope, Text
from qnext_plugin.coupling.syntax import bound_names, is_name, is_none, last_name, statements

# Bases without members of their own that anything here would ask for.
_PLAIN_BASES = {"ABC", "Generic", "NamedTuple", "Protocol", "TypedDict", "object", "Enum", "IntEnum", "StrEnum", "Flag"}
_STATIC = {"staticmethod"}
_ACCESSORS = {"property", "cached_property", "setter"}


class Source:
    """Some ``packages``, by name, and their directories; every other package is unknown."""

    def __init__(self, packages: Mapping[str, Path]) -> None:
        self.packages = packages
        self._modules: dict[str, Module | None] = {}
        self._inferring: set[tuple[int, int]] = set()

    def module(self, name: str) -> Module | None:
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    def knows(self, name: str) -> bool:
        """Whether ``name`` belongs to one of the packages."""
        return name.partition(".")[0] in self.packages

    def resolve(self, dotted: str) -> Entity:
        """``package.module.Class.attribute``; None where the package is unknown."""
        first, *rest = dotted.split(".")
        entity: Entity = self.module(first)
        for name in rest:
            entity = self.member(entity, name)
        return entity

    def member(self, entity: Entity, name: str, called: bool = False) -> Entity:
        """``entity.name``, or ``entity.name(...)``."""
        if isinstance(entity, Module):
            return self._module_member(entity, name, set())
        if isinstance(entity, Class | Instance):
            return self._class_member(entity, name, called)
        return None

    def bases(self, cls: Class) -> tuple[list[Class], set[str]]:
        """The class and those it inherits from, in order, and the names of bases that are in none of the packages."""
        found, unknown = [cls], set[str]()
        for node in cls.node.bases:
            node = node.value if isinstance(node, ast.Subscript) else node
            base = self.infer(node, Scope(cls.module))
            if isinstance(base, Class):
                inherited, outside = self.bases(base)
                found += [c for c in inherited if c not in found]
                unknown |= outside
            elif last_name(node) not in _PLAIN_BASES:
                unknown.add(last_name(node))
        return found, unknown

    def find(
        self, cls: Class, name: str
    ) -> tuple[Class, ast.AST, ast.FunctionDef | ast.AsyncFunctionDef | None] | None:
        """The first of the class and its bases that has the member, and its definition there."""
        for base in self.bases(cls)[0]:
            if name in base.own:
                return (base, *base.own[name])
        return None

    def heirs(self, cls: Class) -> Iterator[Class]:
        """Classes of the same package that inherit from it."""
        package = cls.module.name.partition(".")[0]
        directory, pattern = self.packages[package], re.compile(rb"class (\w+)\([^)]*\b%s\b" % cls.node.name.encode())
        for file in directory.rglob("*.py"):
            for name in pattern.findall(file.read_bytes()):
                parts = [package, *file.relative_to(directory).with_suffix("").parts]
                heir = self.resolve(".".join([*parts[: -1 if parts[-1] == "__init__" else None], name.decode()]))
                if isinstance(heir, Class) and cls in self.bases(heir)[0]:
                    yield heir
                    yield from self.heirs(heir)

    def annotated(self, annotation: ast.expr | None, scope: Scope) -> Entity:
        """The instance that an annotation promises."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            try:
                annotation = ast.parse(annotation.value, mode="eval").body
            except SyntaxError:
                return None
        if isinstance(annotation, ast.BinOp):
            sides = [s for s in (annotation.left, annotation.right) if not is_none(s)]
            return self.annotated(sides[0], scope) if len(sides) == 1 else None
        if isinstance(annotation, ast.Subscript) and last_name(annotation.value) in ("Optional", "ClassVar", "Final"):
            return self.annotated(annotation.slice, scope)
        if isinstance(annotation, ast.Subscript) and last_name(annotation.value) == "Annotated":
            inner = annotation.slice
            return self.annotated(inner.elts[0], scope) if isinstance(inner, ast.Tuple) else None
        if not isinstance(annotation, ast.Name | ast.Attribute):
            return None
        cls = self.infer(annotation, scope)
        return Instance(cls) if isinstance(cls, Class) else None

    def infer(self, node: ast.AST | None, scope: Scope) -> Entity:
        """What an expression is."""
        if node is None or (id(node), id(scope.module)) in self._inferring:
            return None
        key = (id(node), id(scope.module))
        self._inferring.add(key)
        try:
            return self._infer(node, scope)
        finally:
            self._inferring.discard(key)

    def _infer(self, node: ast.AST, scope: Scope) -> Entity:
        if isinstance(node, ast.Name):
            if node.id in scope.local:
                return scope.local[node.id]
            return self.member(scope.module, node.id) if node.id in scope.module.names else None
        if isinstance(node, ast.Constant):
            return Text(node.value) if isinstance(node.value, str) else None
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self.infer(node.left, scope), self.infer(node.right, scope)
            return Text(left.value + right.value) if isinstance(left, Text) and isinstance(right, Text) else None
        if isinstance(node, ast.Attribute):
            return self.member(self.infer(node.value, scope), node.attr)
        if isinstance(node, ast.Call):
            return self._result(node, scope)
        return None

    def _result(self, node: ast.Call, scope: Scope) -> Entity:
        if is_name(node.func, "super") and not node.args:
            owner = scope.local.get("self") or scope.local.get("cls")
            cls = owner.of if isinstance(owner, Instance) else owner
            if isinstance(cls, Class):
                bases = [b for n in cls.node.bases if isinstance(b := self.infer(n, Scope(cls.module)), Class)]
                return Instance(bases[0]) if len(bases) == 1 and len(cls.node.bases) == 1 else None
        func = self.infer(node.func, scope)
        if isinstance(func, Class):
            return Instance(func)
        if isinstance(func, Function):
            return self.annotated(func.node.returns, Scope(func.module))
        return None

    def _read(self, name: str) -> Module | None:
        package, *inner = name.split(".")
        if package not in self.packages:
            return None
        path = self.packages[package].joinpath(*inner)
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return Module(name, file, ast.parse(file.read_bytes(), str(file)))
        return Module(name, None, ast.Module([], [])) if path.is_dir() and any(path.glob("*.py")) else None

    def _module_member(self, module: Module, name: str, seen: set[tuple[str, str]]) -> Entity:
        if (module.name, name) in seen:
            return None
        seen.add((module.name, name))
        node = module.names.get(name)
        if node is not None:
            return self._definition(module, name, node, seen)
        submodule = self.module(f"{module.name}.{name}")
        if submodule is not None:
            return submodule
        unknown_star = False
        for star in module.stars:
            source = self.module(_absolute(module, star))
            entity = self._module_member(source, name, seen) if source else None
            if entity is not None and not isinstance(entity, Missing):
                return entity
            unknown_star = unknown_star or source is None
        if "__getattr__" in module.names and name in module.strings:
            return self._lazy(module, module.strings[name])
        if unknown_star or (name.startswith("__") and name.endswith("__")):
            return None
        return Missing(f"{module.name}.{name}")

    def _lazy(self, module: Module, target: str) -> Entity:
        """What ``".module:Name"`` in a table of lazy attributes points to."""
        if not re.fullmatch(r"\.?[\w.]+:\w+", target):
            return None
        path, _, name = target.partition(":")
        path = f"{module.name}{path}" if path.startswith(".") else path
        return self.resolve(f"{path}.{name}") if self.knows(path) else None

    def _definition(self, module: Module, name: str, node: ast.AST, seen: set[tuple[str, str]]) -> Entity:
        if isinstance(node, ast.ClassDef):
            return self._cached(module, node, lambda: Class(module, node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return Function(module, node)
        if isinstance(node, ast.Import):
            return imported(self, node, name)
        if isinstance(node, ast.ImportFrom):
            alias = next(a for a in node.names if (a.asname or a.name) == name)
            source = _absolute(module, node)
            if not self.knows(source):
                return None
            target = self.module(source)
            return self._module_member(target, alias.name, seen) if target else Missing(source)
        if isinstance(node, ast.AnnAssign):
            return self.annotated(node.annotation, Scope(module)) or self.infer(node.value, Scope(module))
        if isinstance(node, ast.Assign) and is_name(node.targets[0], name):
            return self.infer(node.value, Scope(module))
        return None

    def _cached(self, module: Module, node: ast.AST, make: Callable[[], Class]) -> Class:
        cache: dict[int, Class] = module.__dict__.setdefault("_classes", {})
        return cache.setdefault(id(node), cache.get(id(node)) or make())

    def _class_member(self, entity: Class | Instance, name: str, called: bool) -> Entity:
        cls = entity.of if isinstance(entity, Instance) else entity
        found = self.find(cls, name)
        if found is None:
            bases, unknown = self.bases(cls)
            if called and unknown == {"Module"}:  # which registers parameters by name, but no methods
                unknown = {name} & _torch_module_members()
            open_ended = unknown or any("__getattr__" in base.own for base in bases)
            if open_ended or name in ("name", "value") or name.startswith("__"):
                return None
            if isinstance(entity, Instance) and any(name in heir.own for heir in self.heirs(cls)):
                return None  # an annotation may name the base of what is really there
            return Missing(f"{cls.name}.{name}")
        owner, node, method = found
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = Function(owner.module, node, owner)
            if function.decorators & _ACCESSORS:
                return self.annotated(node.returns, Scope(owner.module))
            bound = not function.decorators & _STATIC and (
                isinstance(entity, Instance) or "classmethod" in function.decorators
            )
            return Function(owner.module, node, owner, bound)
        if isinstance(node, ast.ClassDef):
            return self._cached(owner.module, node, lambda: Class(owner.module, node))
        if isinstance(node, ast.AnnAssign):
            return self.annotated(node.annotation, Scope(owner.module)) or self.infer(node.value, Scope(owner.module))
        if isinstance(node, ast.Assign):
            scope = Scope(owner.module, self.parameters(method, owner) if method else {})
            return self.infer(node.value, scope)
        return None

    def parameters(self, function: ast.FunctionDef | ast.AsyncFunctionDef, owner: Class | None) -> dict[str, Entity]:
        """What a function's parameters are, by their annotations; ``self`` and ``cls`` by the class it is in."""
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        module = owner.module if owner else None
        found: dict[str, Entity] = {}
        for argument in (*every, *filter(None, (arguments.vararg, arguments.kwarg))):
            found[argument.arg] = None
        if module:
            found |= {a.arg: self.annotated(a.annotation, Scope(module)) for a in every}
        decorators = {last_name(d) for d in function.decorator_list}
        if owner and every and not decorators & _STATIC:
            found[every[0].arg] = owner if "classmethod" in decorators else Instance(owner)
        return found


@cache
def _torch_module_members() -> set[str]:
    """Names that ``torch.nn.Module`` defines; torch is not imported for that."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent / "nn/modules/module.py"
    classes = [n for n in ast.parse(file.read_bytes()).body if isinstance(n, ast.ClassDef) and n.name == "Module"]
    return {name for cls in classes for node in statements(cls.body) for name in bound_names(node)}


def imported(source: Source, node: ast.Import, name: str) -> Entity:
    """What ``import a.b`` or ``import a.b as c`` binds to ``name``."""
    for alias in node.names:
        if alias.asname == name:
            return source.module(alias.name) or (Missing(alias.name) if source.knows(alias.name) else None)
        if alias.asname is None and alias.name.partition(".")[0] == name:
            return source.module(name)
    return None


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.name.split(".")
    is_package = module.file is not None and module.file.name == "__init__.py"
    drop = node.level - 1 if is_package else node.level
    package = package[: len(package) - drop] if drop else package
    return ".".join([*package, *([node.module] if node.module else [])])
