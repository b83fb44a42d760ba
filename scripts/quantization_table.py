"""Write the table of docs/quantization.md from test results: ``python scripts/quantization_table.py XML...``.

The arguments are JUnit files (``pytest --junitxml``). A passed test fills cells with properties named ``matrix``, each
``format | engine | column | what was shown``; a cell that no passed test fills is unproven. Rows of an engine that none
of the files is about stay as they are: each is tested in an environment of its own.
"""

import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path

DOCUMENT = Path(__file__).parent.parent / "docs" / "quantization.md"
BEGIN, END = "<!-- quantized checkpoints: scripts/quantization_table.py -->\n", "<!-- end -->\n"
FORMATS = (
    *("fp8-block", "fp8-channel", "w8a8", "w4a16", "mxfp8", "mxfp4", "nvfp4-llm-compressor"),
    *("awq", "gptq", "gptq-int8", "nvfp4", "mxfp4-quark", "auto-round-mixed", "two-groups"),
)
ENGINES = ("vLLM", "SGLang")
COLUMNS = ("one process, MTP", "TP 1, 2, 4, 8", "TP 2", "EP 2", "PP 2")
UNPROVEN = "unproven"


def cells(files: Iterable[str]) -> dict[tuple[str, str, str], str]:
    found = {}
    for file in files:
        for case in ET.parse(file).getroot().iter("testcase"):
            if any(case.find(outcome) is not None for outcome in ("failure", "error", "skipped")):
                continue
            for prop in case.iter("property"):
                if prop.get("name") == "matrix":
                    form, engine, column, shown = (part.strip() for part in prop.get("value").split("|"))
                    assert form in FORMATS and engine in ENGINES and column in COLUMNS, prop.get("value")
                    found[form, engine, column] = shown
    return found


def table(found: dict[tuple[str, str, str], str], before: str) -> str:
    rows = [["format", "engine", *COLUMNS], ["---"] * (2 + len(COLUMNS))]
    kept = {tuple(words[:2]): words for line in before.splitlines() if (words := line.strip("| ").split(" | "))}
    tested = {engine for _, engine, _ in found}
    rows += [
        [f"`{form}`", engine, *(found.get((form, engine, column), UNPROVEN) for column in COLUMNS)]
        if engine in tested
        else kept.get((f"`{form}`", engine), [f"`{form}`", engine, *[UNPROVEN] * len(COLUMNS)])
        for engine in ENGINES
        for form in FORMATS
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(*files: str) -> None:
    before, rest = DOCUMENT.read_text().split(BEGIN)
    old, after = rest.split(END)
    DOCUMENT.write_text(before + BEGIN + table(cells(files), old) + END + after)


if __name__ == "__main__":
    main(*sys.argv[1:])
