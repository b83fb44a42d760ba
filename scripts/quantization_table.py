"""Write the table of docs/quantization.md from test results: ``python scripts/quantization_table.py XML...``.

The arguments are JUnit files (``pytest --junitxml``) without failures. A passed test fills cells with properties named
``matrix``, each ``format | engine | column | what was shown``. Cells whose tests were not run stay as they are, and a
cell that no test has filled is unproven.
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
            if case.find("failure") is not None or case.find("error") is not None:
                raise SystemExit(f"{file}: {case.get('name')} failed; expected results without failures")
            for prop in case.iter("property") if case.find("skipped") is None else ():
                if prop.get("name") == "matrix":
                    form, engine, column, shown = (part.strip() for part in prop.get("value").split("|"))
                    assert form in FORMATS and engine in ENGINES and column in COLUMNS, prop.get("value")
                    found[form, engine, column] = shown
    return found


def table(found: dict[tuple[str, str, str], str], before: str) -> str:
    rows = [["format", "engine", *COLUMNS], ["---"] * (2 + len(COLUMNS))]
    kept = {tuple(words[:2]): words[2:] for line in before.splitlines() if (words := line.strip("| ").split(" | "))}
    for engine in ENGINES:
        for form in FORMATS:
            old = kept.get((f"`{form}`", engine), [UNPROVEN] * len(COLUMNS))
            new = [found.get((form, engine, column), cell) for column, cell in zip(COLUMNS, old, strict=True)]
            rows.append([f"`{form}`", engine, *new])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(*files: str) -> None:
    before, rest = DOCUMENT.read_text().split(BEGIN)
    old, after = rest.split(END)
    DOCUMENT.write_text(before + BEGIN + table(cells(files), old) + END + after)


if __name__ == "__main__":
    main(*sys.argv[1:])
