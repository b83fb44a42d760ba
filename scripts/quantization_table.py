"""Write the README's table of quantised checkpoints from test results: ``python scripts/quantization_table.py XML...``.

The arguments are JUnit files (``pytest --junitxml``). A passed test fills cells with properties named ``matrix``, each
``format | engine | column | what was shown``; a cell that no passed test fills is unproven. An engine's column that
none of the files is about stays as it is: other tests fill it, or those of another environment.
"""

import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- quantised checkpoints: scripts/quantization_table.py -->\n", "<!-- end -->\n"
FORMATS = ("fp8-block", "fp8-channel", "w8a8", "w4a16", "awq", "gptq", "nvfp4")
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
    kept = {tuple(words[:2]): words[2:] for line in before.splitlines() if (words := line.strip("| ").split(" | "))}
    tested = {(engine, column) for _, engine, column in found}

    def cell(form: str, engine: str, column: str, old: str) -> str:
        return found.get((form, engine, column), UNPROVEN) if (engine, column) in tested else old

    for engine in ENGINES:
        for form in FORMATS:
            old = zip(COLUMNS, kept[f"`{form}`", engine], strict=True)
            rows.append([f"`{form}`", engine, *(cell(form, engine, *pair) for pair in old)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(*files: str) -> None:
    before, rest = README.read_text().split(BEGIN)
    old, after = rest.split(END)
    README.write_text(before + BEGIN + table(cells(files), old) + END + after)


if __name__ == "__main__":
    main(*sys.argv[1:])
