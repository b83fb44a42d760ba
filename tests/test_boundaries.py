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


ABOVE = {
    "plan": ("engines", "verify", "bench", "cli"),
    "engines": ("plan", "verify", "bench", "cli"),
    "verify": ("bench", "cli"),
    "bench": ("cli",),
}


@pytest.mark.parametrize("room", ABOVE)
def test_a_room_imports_nothing_above_it(room: str) -> None:
    found = [
        (file, name)
        for file, tree in parsed(f"qnext_plugin/{room}").items()
        for name in imports(tree)
        if any(is_within(name, f"qnext_plugin.{above}") for above in ABOVE[room])
    ]
    assert not found
