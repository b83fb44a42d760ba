"""What may import what: the core no engine, one engine's adapter not the other's, no adapter the native model."""

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.imports import ROOT, cycles, imported, modules, reachable

ENGINES = {"vllm_ext": "vllm", "sglang_ext": "sglang"}
ADAPTERS = list(ENGINES)
NATIVE_MODULES = ("vllm.model_executor.models.qwen3_next", "sglang.srt.models.qwen3_next")
NATIVE_CLASSES = ("QwenGatedDeltaNetAttention", "Qwen3GatedDeltaNet")
ROOMS = (
    *("config", "kernel_log", "replacements", "checkpoint", "ops", "reference", "plan"),
    *("engines", "verify", "bench", "cli"),
)
"""Of the core, each of which imports none that follows it."""
ALIASES = ("vllm_ext.scheduler", "vllm_ext.ray_executor")
"""Names that users type, of classes in ``vllm_ext.cpu``."""
PURE = {
    "all",
    "isinstance",
    "len",
    "is_contiguous",
    "stride",
    "startswith",
    "values",
    "poll",
    "monotonic",
    "token_to_id",
}
"""Functions that an ``assert`` may call."""


def within(package: str) -> list[str]:
    found = [name for name in modules() if is_within(name, package)]
    assert len(found) > 5
    return found


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


def words(tree: ast.Module) -> Iterator[str]:
    """Every identifier and string constant, so that ``getattr`` and lazy ``"module:Class"`` names count as well."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "module", "value"):
            word = getattr(node, field, None)
            if isinstance(word, str):
                yield word


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_core_imports_no_engine_when_every_module_of_it_is_imported() -> None:
    core = [name for name in within("qnext_plugin") if not name.endswith("__main__")]
    assert not imported_with(*core) & {*ENGINES, *ENGINES.values()}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_entry_point_module_imports_nothing_heavy(adapter: str) -> None:
    assert not imported_with(f"{adapter}.register") & {"torch", "transformers", "vllm", "sglang"}


@pytest.mark.parametrize("package", ["qnext_plugin", *ADAPTERS])
def test_source_imports_no_other_engine(package: str) -> None:
    foreign = {*ENGINES, *ENGINES.values()} - {package, ENGINES.get(package)}
    found = [(module, name) for module in within(package) for name in imported(module, lazy=True)]
    assert not [(module, name) for module, name in found if name.split(".")[0] in foreign]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter_uses_nothing_of_the_native_model(adapter: str) -> None:
    used = {(module, name) for module in within(adapter) for name in imported(module, lazy=True)}
    used |= {(module, word) for module in within(adapter) for word in words(modules()[module])}
    assert not [(module, name) for module, name in used if name.startswith(NATIVE_MODULES) or name in NATIVE_CLASSES]


def test_no_import_leads_back_to_where_it_began() -> None:
    """Imports for typing only and in functions included."""
    assert not cycles({module: imported(module, lazy=True) for module in modules()})
    assert cycles({"a": ["b"], "b": ["c"], "c": ["b", "d"], "d": []}) == ["b -> c -> b"]


def test_rooms_of_the_core_import_only_those_listed_before_them() -> None:
    found = {(module, room(module), room(name)) for module in within("qnext_plugin") for name in imported(module, True)}
    later = {(module, to) for module, here, to in found if here and to and ROOMS.index(to) > ROOMS.index(here)}
    assert not later


def room(module: str) -> str:
    """Of the core; empty for what is not in one."""
    package, _, rest = module.partition(".")
    return rest.split(".")[0] if package == "qnext_plugin" else ""


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_model_stands_on_no_tool(adapter: str) -> None:
    """Nor on an entry point, which only what the engine or a tool starts may import."""
    above = (f"{adapter}.tools", f"{adapter}.register")
    model = [name for name in within(adapter) if not name.startswith((*above, f"{adapter}.models"))]
    found = [(module, name) for module in model for name in imported(module, lazy=True) if name.startswith(above)]
    assert not found


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_gpu_server_imports_nothing_that_is_for_cpus(adapter: str) -> None:
    """What the model imports on a CPU, it imports in a function that asks for the platform first."""
    cpu = f"{adapter}.cpu"
    model = [name for name in within(adapter) if not name.startswith((cpu, f"{adapter}.tools", *ALIASES))]
    for name in reachable(model):
        assert name.split(".")[0] not in ("numba", "llvmlite"), name
        assert not is_within(name, cpu) and not is_within(name, "qnext_plugin.ops.cpu"), name


def test_no_assert_has_a_side_effect() -> None:
    """With ``python -O`` it would not happen. What asserts call is on a list, so that each new call is looked at."""
    tests = [node.test for tree in modules().values() for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    calls = [node.func for test in tests for node in ast.walk(test) if isinstance(node, ast.Call)]
    names = {call.attr if isinstance(call, ast.Attribute) else ast.unparse(call) for call in calls}
    assert not names - PURE


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_compat_is_a_leaf(adapter: str) -> None:
    """It names functions of the adapter by strings, so that every module may import it."""
    assert not [name for name in imported(f"{adapter}.compat", lazy=True) if is_within(name, adapter)]
