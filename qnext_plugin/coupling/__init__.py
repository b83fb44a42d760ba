"""Does an engine still have what an adapter uses of it? Told from both sources; nothing is imported or run.

Checked are imports, attributes, the arguments of calls, base classes and what they demand, names given as strings
(patch targets, registered kernels, ``torch.ops``), and that somebody asks for what the adapter's classes offer. Where
the source does not say what an object is, nothing is concluded: an attribute of such an object is not checked.
"""

import ast
from importlib.util import find_spec
from pathlib import Path

from qnext_plugin.coupling.source import Source
from qnext_plugin.coupling.uses import Report, Uses, mentioned

CORE = "qnext_plugin"


def check_installed(adapter: str, engine: str) -> Report:
    """``check`` for the packages that this process would import."""
    return check(adapter, engine, _directory(adapter), _directory(engine))


def check(adapter: str, engine: str, adapter_directory: Path, engine_directory: Path) -> Report:
    """Compare the package ``adapter`` with the package ``engine``, each below its directory."""
    core = _directory(CORE)
    source = Source({adapter: adapter_directory, engine: engine_directory, CORE: core})
    report, offered, used = Report(), dict[str, str](), set[str]()
    for file in sorted([*adapter_directory.rglob("*.py"), *core.rglob("*.py")]):
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
        used |= {n.attr for n in nodes if isinstance(n, ast.Attribute)}
        # Remote procedures are called by name.
        used |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    for file in sorted(adapter_directory.rglob("*.py")):
        parts = [adapter, *file.relative_to(adapter_directory).with_suffix("").parts]
        module = source.module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        assert module is not None
        visitor = Uses(source, module, engine, report)
        visitor.visit(module.tree)
        offered |= visitor.offered
    asked_for = mentioned(engine_directory, set(offered) - used)
    report.problems += [
        f"{where}: nothing in {engine} asks for {name!r} any more"
        for name, where in offered.items()
        if name not in used and name not in asked_for
    ]
    return report


def _directory(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"there is no package {package!r} in this environment; install it")
    return Path(spec.submodule_search_locations[0])
