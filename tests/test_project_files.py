"""What only a host, a package index or a container builder reads: it parses, and what it names is there."""

import json
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
from email.parser import BytesParser
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

from qnext_plugin import __version__

ROOT = Path(__file__).parents[1]
PROJECTS = ("pyproject.toml", "sglang_cpu/pyproject.toml")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PATH = re.compile(r"(?:\.ci|\.github|docker|docs|scripts|tests)/[\w./*-]*[\w*]")
"""A name that begins with a folder of this repository."""


def project(file: str) -> dict:
    return tomllib.loads((ROOT / file).read_text())["project"]


def assert_paths_exist(text: str) -> None:
    for path in PATH.findall(text):
        assert list(ROOT.glob(path)), path


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = ["env", f"PYTHON={sys.executable}", "scripts/build", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_distributions_are_what_a_package_index_takes(dist: Path) -> None:
    wheels, sdists = list(dist.glob("*.whl")), list(dist.glob("*.tar.gz"))
    assert len(wheels) == len(sdists) == 2
    for sdist in sdists:
        with tarfile.open(sdist) as archive:
            assert {name.split("/")[0] for name in archive.getnames()} == {sdist.name.removesuffix(".tar.gz")}
    for wheel in wheels:
        with ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            metadata = BytesParser().parsebytes(archive.read(name))
        assert metadata["Version"] == __version__ and metadata["License-Expression"] == "Apache-2.0"
        assert metadata["Description-Content-Type"] == "text/markdown" and metadata.get_payload().strip()
        assert all(metadata[key] for key in ("Summary", "Keywords", "Requires-Python"))
        assert len(metadata.get_all("Classifier")) > 5


def test_citation_has_the_version_and_license() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == __version__ == project("sglang_cpu/pyproject.toml")["version"]
    assert {citation["license"]} == {project(file)["license"] for file in PROJECTS}


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflow_names_what_exists(file: Path) -> None:
    workflow = yaml.safe_load(file.read_text())
    assert workflow["name"] and workflow[True] and workflow["permissions"] == {"contents": "read"}  # on: is True
    for job in workflow["jobs"].values():
        assert set(shlex.split(str(job.get("needs", "")))) <= workflow["jobs"].keys()
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+@[\w./]+", step["uses"]) for step in job["steps"] if "uses" in step)
    assert_paths_exist(json.dumps(workflow))


def test_hosted_run_is_the_one_command() -> None:
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.name)
def test_issue_form_is_complete(file: Path) -> None:
    form = yaml.safe_load(file.read_text())
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) and all(field["attributes"]["label"] for field in form["body"])
    assert_paths_exist(file.read_text())


def test_hooks_and_texts_name_what_exists() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {hook["id"] for hook in hooks} == {"format", "lint", "project-files", "check"}
    assert all(shlex.split(hook["entry"]) and repo["repo"] == "local" for repo in config["repos"] for hook in hooks)
    assert_paths_exist(" ".join(hook["entry"] for hook in hooks))
    for name in ("SECURITY.md", "CONTRIBUTING.md", ".github/PULL_REQUEST_TEMPLATE.md"):
        assert_paths_exist((ROOT / name).read_text())


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_dockerfile_copies_what_exists_over_the_pinned_engine(file: Path) -> None:
    text = re.sub(r"\\\n", " ", file.read_text())
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    copied = [line[1:-1] for line in lines if line[:1] == ["COPY"]]
    sources = [source for sources in copied for source in sources]
    assert len(sources) > 10 and all(list(ROOT.glob(source)) for source in sources)
    engine = file.stem
    pinned = (ROOT / "scripts" / f"requirements-{engine}-cuda.txt").read_text()
    image = next(line[1] for line in lines if line[:1] == ["FROM"] and line[3] == "gpu")
    assert f"{engine}=={image.partition(':v')[2]}\n" in pinned
    for stage in re.split("^FROM ", text, flags=re.MULTILINE)[1:]:
        assert "COPY qnext_plugin " in stage and f"COPY {engine}_ext " in stage
