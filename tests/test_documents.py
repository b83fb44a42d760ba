"""The README and docs/: one page, links that lead somewhere, commands that exist and files that are there."""

import re
import subprocess
import sys

import pytest

from qnext_plugin.cli import parser
from tests.support.documents import CODE, DOCUMENTS, PAGES, ROOT, anchors, commands, links, name, prose

FOLDERS = ("bench", "docs", "examples", "qnext_plugin", "scripts", "sglang_cpu", "sglang_ext", "tests", "vllm_ext")
PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*")
CURRENT = [document for document in DOCUMENTS if document.name != "CHANGELOG.md"]
QNEXT = [(document, words) for document in CURRENT for words in commands(document, "qnext")]


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_link_leads_somewhere(document):
    wrong = []
    for link in links(document):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
        if document in PAGES and not target.is_relative_to(ROOT / "docs"):
            wrong.append(f"{link}: not on the site")
    assert not wrong


def test_every_page_is_on_the_site_and_linked():
    listed = re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES]
    linked = {(d.parent / link.partition("#")[0]).resolve() for d in DOCUMENTS for link in links(d)}
    assert not {*PAGES, *(ROOT / "docs" / "figures").glob("*.svg")} - linked


@pytest.mark.parametrize(("document", "words"), [pytest.param(d, w, id=f"{name(d)}: {' '.join(w)}") for d, w in QNEXT])
def test_a_qnext_command_is_one(document, words):
    words = [word for word in words if word != "FLAGS"]
    if words[1:] and words[0] != "COMMAND":  # not `qnext doctor`, which names a command
        args, rest = parser().parse_known_args(words)
        assert not rest or hasattr(args, "flags"), f"unknown: {rest}"


def test_commands_are_found():
    assert len(QNEXT) > 30
    assert ["--model-path", "MODEL"] in commands(ROOT / "docs" / "sglang.md", "python", "-m", "sglang.launch_server")


@pytest.mark.parametrize("document", CURRENT, ids=name)
def test_every_file_that_is_named_is_there(document):
    named = [word for code in CODE.findall(prose(document)) for word in code.split() if PATH.fullmatch(word)]
    missing = [word for word in named if not (ROOT / word).exists()]
    assert not missing


def test_the_evaluation_asks_for_tasks_that_are_there():
    folder = ROOT / "bench" / "evaluation"
    tasks = {re.search(r"^task: (\w+)$", file.read_text(), re.MULTILINE)[1] for file in folder.glob("*.yaml")}
    (own,) = (c for c in commands(ROOT / "docs" / "evaluation.md", "lm-eval/bin/lm_eval", "run") if "gsm8k" not in c)
    assert (ROOT / own[own.index("--include_path") + 1]).samefile(folder)
    assert tasks == set(own[own.index("--tasks") + 1 : own.index("--apply_chat_template")])


def test_figures_are_drawn_from_the_results():
    check = subprocess.run(
        [sys.executable, "-m", "bench.figures", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stdout + check.stderr


def test_the_speeds_of_the_readme_are_those_of_the_results():
    from bench.figures import results

    def span(cpu, kind):
        ratios = [w["ratio"] for name, w in results(f"{cpu}eager")["workloads"].items() if name.startswith(kind)]
        return " to ".join(sorted({f"{min(ratios):.1f}", f"{max(ratios):.1f}"}))

    first, second = ([span(cpu, kind) for kind in ("prefill", "decode")] for cpu in ("cpu-", "cpu-avx2-"))
    claim = "{} times as fast at prompts and {} at decoding with AVX512-BF16, and {} and {} times with AVX2 alone"
    assert claim.format(*first, *second) in " ".join((ROOT / "README.md").read_text().split())


def test_the_figures_of_memory_are_those_of_the_plan():
    from bench import plan_80b
    from bench.figures import results
    from qnext_plugin.plan.sizes import Serving

    found = results("plan-80b")
    assert found["weights"]["bfloat16"] == Serving(plan_80b.CONFIG, num_draft_tokens=plan_80b.DRAFTS).weights()
    assert found["concurrency"] == plan_80b.concurrency(found["weights"])
    sizes = (sum(found["weights"][form].values()) // 2**30 for form in ("bfloat16", "fp8-block", "w4a16"))
    named = "{} GiB in bfloat16, {} GiB in FP8 and {} GiB in 4 bits".format(*sizes)
    assert all(named in " ".join((ROOT / page).read_text().split()) for page in ("README.md", "docs/gpu.md"))
