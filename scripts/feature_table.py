"""Write the tables of docs/features.md from tests/support/features: ``python scripts/feature_table.py``."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.features import SECTIONS  # noqa: E402
from tests.support.features.cells import Feature  # noqa: E402

DOCUMENT = ROOT / "docs" / "features.md"
BEGIN, END = "<!-- features: scripts/feature_table.py -->\n", "<!-- end -->\n"


def tables() -> str:
    parts = []
    for title, rows in SECTIONS.items():
        lines = [["feature", "vLLM", "SGLang"], ["---"] * 3]
        for row in rows:
            cells = [row.cell(engine).text() + flags(row, engine) for engine in ("vllm", "sglang")]
            lines.append([row.name, *cells])
        parts.append(f"## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(parts)


def flags(row: Feature, engine: str) -> str:
    named = " ".join(f"`--{flag}`" for flag in row.flags(engine))
    return f"<br>{named}" if named else ""


def main() -> None:
    before, rest = DOCUMENT.read_text().split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(before + BEGIN + tables() + END + after)


if __name__ == "__main__":
    main()
