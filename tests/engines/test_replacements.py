"""The list of what is replaced in the engine: each is there, takes what ours gives it, and is replaced once."""

import inspect
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from qnext_plugin.engines import process
from qnext_plugin.replacements import problem_with, resolve
from tests.support.installed import ENGINE

REPLACEMENTS = import_module(f"{ENGINE}_ext.compat").REPLACEMENTS

LOAD_PLUGINS = {
    "vllm": "from vllm.plugins import load_general_plugins; load_general_plugins()",
    "sglang": "from sglang.srt.plugins import load_plugins; load_plugins()",
}
# Everything that can be used at once.
APPLY = {
    "vllm": """
from types import SimpleNamespace
from importlib.util import find_spec
executor = "vllm_ext.ray_executor.CpuRayExecutor" if find_spec("ray") else "mp"
parallel = SimpleNamespace(
    enable_expert_parallel=True, data_parallel_size=2, pipeline_parallel_size=2, distributed_executor_backend=executor
)
cache = SimpleNamespace(prefix_match_unit=32)
used = dict(lora_config=1, speculative_config=1, parallel_config=parallel, cache_config=cache)
compat.lacks_bfloat16 = lambda: True
apply = lambda: [compat.apply(SimpleNamespace(**used, use_v2_model_runner=v2)) for v2 in (False, True)]
""",
    "sglang": """
used = dict(drafts="NGRAM", adapters=True, quantization=True, packages=("fla", "causal_conv1d"))
apply = lambda: compat.apply(compat.Uses(model=True, **used))
""",
}
TWICE = """
from qnext_plugin.replacements import IN_FORCE, resolve
wanted = [r for r in compat.REPLACEMENTS if "ray" not in r.target or find_spec("ray")]
def original(target):
    try:
        return resolve(target)
    except ImportError:  # of a module whose place another of ours takes
        return None
before = {r.target: original(r.target) for r in wanted if "[" not in r.target}
apply()
once = {r.target: resolve(r.target) for r in wanted}
assert all(once[target] != original for target, original in before.items())
assert IN_FORCE.keys() == once.keys(), IN_FORCE.keys() ^ once.keys()
apply()
assert all(resolve(target) == ours for target, ours in once.items())
"""


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """Put ours in the place of modules that cannot be imported here, but are by those of other targets."""
    for replacement in REPLACEMENTS:
        place, _, name = replacement.target.partition("[")
        if place == "sys:modules":
            monkeypatch.setitem(sys.modules, name.removesuffix("]"), resolve(replacement.ours))


def accepts(ours, arguments):
    """Whether ``ours`` can be called with these, the first of them by position and the others by name."""
    for i in range(len(arguments) + 1):
        try:
            inspect.signature(ours).bind(*arguments[:i], **dict.fromkeys(arguments[i:]))
            return True
        except TypeError:
            continue
    return False


def calls(target, kind):
    """The names of what a target must be given, and of all that it takes."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [p for p in inspect.signature(target).parameters.values() if p.kind not in variable]
    first = ["original"] if kind == "around" else []
    return [first + [p.name for p in some] for some in ([p for p in parameters if p.default is p.empty], parameters)]


@pytest.mark.parametrize("replacement", REPLACEMENTS, ids=lambda replacement: replacement.target)
def test_target_is_there_and_ours_fits(replacement):
    if ".ray_executor" in replacement.target + replacement.ours and not find_spec("ray"):
        pytest.skip("Ray is not installed: pip install ray")
    assert problem_with(replacement) == ""
    ours = resolve(replacement.ours)
    assert replacement.why and replacement.until
    if replacement.kind != "set" and not inspect.isclass(ours):
        possible = calls(resolve(replacement.target), replacement.kind)
        assert any(accepts(ours, names) for names in possible), (
            f"{replacement.ours} can be called with none of {possible}"
        )


def test_targets_differ():
    assert len({replacement.target for replacement in REPLACEMENTS}) == len(REPLACEMENTS)


def test_each_is_replaced_once(tmp_path, libraries):
    code = f"from importlib.util import find_spec\nfrom {ENGINE}_ext import compat\n{APPLY[ENGINE]}\n{TWICE}"
    with libraries.forking():
        assert process.run(["-c", code], tmp_path / "log") == 0, process.tail(tmp_path / "log")


def test_registration_alone_replaces_nothing(tmp_path, libraries):
    """Nor does another architecture: only the constructors of our models replace anything."""
    code = (
        f"{LOAD_PLUGINS[ENGINE]}\n"
        "import sys\n"
        "assert 'qnext_plugin' in sys.modules\n"
        "from qnext_plugin.replacements import IN_FORCE\n"
        "assert not IN_FORCE, IN_FORCE"
    )
    with libraries.forking():
        assert process.run(["-c", code], tmp_path / "log") == 0, process.tail(tmp_path / "log")
