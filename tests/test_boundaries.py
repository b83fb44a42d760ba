"""What may import what: the core no engine, one engine's adapter not the other's, no adapter the native model."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINES = {"vllm_ext": "vllm", "sglang_ext": "sglang"}
ADAPTERS = [name for name in ENGINES if (ROOT / name).exists()]
NATIVE_MODULES = ("vllm.model_executor.models.qwen3_next", "sglang.srt.models.qwen3_next")
NATIVE_CLASSES = ("QwenGatedDeltaNetAttention", "Qwen3GatedDeltaNet")
# Calls that change nothing, so that an `assert` may make them: it is gone under `python -O`.
PURE = {"all", "any", "isinstance", "len"} | {
    "is_contiguous",
    "monotonic",
    "startswith",
    "stride",
    "token_to_id",
    "values",
}


def modules(package: str) -> list[str]:
    names = (p.relative_to(ROOT).with_suffix("").parts for p in sorted((ROOT / package).rglob("*.py")))
    return [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in names]


def imported_with(*names: str) -> set[str]:
    """Top-level names in ``sys.modules`` after a new interpreter imported ``names``."""
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def imports(tree: ast.Module) -> Iterator[str]:
    """Full dotted name of everything imported: ``from a import b`` gives ``a.b``; relative ones are the package's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def words(tree: ast.Module) -> Iterator[str]:
    """Every identifier and string constant, so that ``getattr`` and lazy ``"module:Class"`` names count as well."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "module", "value"):
            word = getattr(node, field, None)
            if isinstance(word, str):
                yield word


def parsed(package: str) -> dict[str, ast.Module]:
    return {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in sorted((ROOT / package).rglob("*.py"))}


def called_in_asserts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and last name of every call in the condition of an ``assert``; an assignment there counts as one."""
    for statement in ast.walk(tree):
        for node in ast.walk(statement.test) if isinstance(statement, ast.Assert) else ():
            if isinstance(node, ast.Call):
                yield statement.lineno, ast.unparse(node.func).rpartition(".")[2]
            elif isinstance(node, ast.NamedExpr | ast.Await | ast.Yield):
                yield statement.lineno, ast.unparse(node)


def imported_at_once(tree: ast.Module) -> Iterator[str]:
    """What is imported when a module is: not what stands in a function, nor what is for a type checker only."""
    return imports(ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], []))


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_core_imports_no_engine_when_every_module_of_it_is_imported() -> None:
    core = [name for name in modules("qnext_plugin") if not name.endswith("__main__")]
    assert len(core) > 5
    assert not imported_with(*core) & {*ENGINES, *ENGINES.values()}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_entry_point_module_imports_nothing_heavy(adapter: str) -> None:
    assert not imported_with(f"{adapter}.register") & {"torch", "transformers", "vllm", "sglang"}


@pytest.mark.parametrize("package", ["qnext_plugin", *ADAPTERS])
def test_source_imports_no_other_engine(package: str) -> None:
    foreign = {*ENGINES, *ENGINES.values()} - {package, ENGINES.get(package)}
    found = [
        (file, name)
        for file, tree in parsed(package).items()
        for name in imports(tree)
        if any(is_within(name, other) for other in foreign)
    ]
    assert not found


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter_uses_nothing_of_the_native_model(adapter: str) -> None:
    trees = parsed(adapter)
    imported = [
        (file, name) for file, tree in trees.items() for name in imports(tree) if name.startswith(NATIVE_MODULES)
    ]
    named = [
        (file, word)
        for file, tree in trees.items()
        for word in words(tree)
        if word.startswith(NATIVE_MODULES) or word in NATIVE_CLASSES
    ]
    assert not imported + named


@pytest.mark.parametrize("package", ["qnext_plugin", *ADAPTERS])
def test_no_assert_has_a_side_effect(package: str) -> None:
    found = [(file, line, name) for file, tree in parsed(package).items() for line, name in called_in_asserts(tree)]
    assert not [call for call in found if call[2] not in PURE]


# Names that users type, for classes that run on CPUs only.
ALIASES = {"vllm_ext/scheduler.py", "vllm_ext/ray_executor.py"}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_a_gpu_server_imports_imports_nothing_for_cpus(adapter: str) -> None:
    """Modules of the adapter's top level are imported by every server, those below ``cpu`` on a CPU alone."""
    at_the_top = {file: tree for file, tree in parsed(adapter).items() if file.count("/") == 1}
    found = [
        (file, name)
        for file, tree in at_the_top.items()
        if file not in ALIASES
        for name in imported_at_once(tree)
        if is_within(name, f"{adapter}.cpu") or is_within(name, "qnext_plugin.ops.cpu") or is_within(name, "numba")
    ]
    assert len(at_the_top) > 10 and not found


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_compat_is_a_leaf(adapter: str) -> None:
    """It names functions of the adapter by strings, so that every module may import it."""
    assert not [name for name in imports(parsed(adapter)[f"{adapter}/compat.py"]) if is_within(name, adapter)]
