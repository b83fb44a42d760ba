"""Draw a small SVG that reads in light and dark: text, rectangles and lines on a card with its own background."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

LIGHT = {
    "card": "#ffffff",
    "edge": "#d1d9e0",
    "ink": "#1f2328",
    "soft": "#57606a",
    "a": "#1068bf",
    "b": "#c2570c",
    "c": "#1a7f37",
    "d": "#8250df",
    "gray": "#afb8c1",
    "on": "#ffffff",
}
DARK = {
    "card": "#0d1117",
    "edge": "#3d444d",
    "ink": "#f0f6fc",
    "soft": "#9198a1",
    "a": "#58a6ff",
    "b": "#f0883e",
    "c": "#3fb950",
    "d": "#bc8cff",
    "gray": "#57606a",
    "on": "#0d1117",
}
"""Colors by class: the card and its edge, text, four series, what is aside, and text on a series."""


def _rules(colors: dict[str, str]) -> str:
    return "".join(f".{name}{{fill:{color}}}.{name}-line{{stroke:{color}}}" for name, color in colors.items())


STYLE = f"text{{font:13px system-ui,sans-serif}}.small{{font-size:11px}}.bold{{font-weight:600}}{_rules(LIGHT)}"
STYLE_DARK = f"@media (prefers-color-scheme:dark){{{_rules(DARK)}}}"


class Drawing:
    """Shapes in the order in which they are drawn; ``title`` is what a screen reader says."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._shapes: list[str] = []

    def text(
        self, x: float, y: float, text: str, color: str = "ink", *, anchor: str = "start", style: str = ""
    ) -> None:
        """Write ``text`` with its baseline at ``y``. ``style`` is of ``small`` and ``bold``."""
        names = f"{color} {style}".strip()
        self._shapes.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{names}">{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, color: str, *, opacity: float = 1) -> None:
        faint = f' opacity="{opacity:g}"' if opacity < 1 else ""
        self._shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" class="{color}"{faint}/>'
        )

    def line(self, points: Sequence[tuple[float, float]], color: str, *, width: float = 1, dash: str = "") -> None:
        joined = " ".join(f"{x:g},{y:g}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self._shapes.append(
            f'<polyline points="{joined}" fill="none" stroke-width="{width:g}" class="{color}-line"{dashed}/>'
        )

    def dot(self, x: float, y: float, color: str) -> None:
        self._shapes.append(f'<circle cx="{x:g}" cy="{y:g}" r="3.5" class="{color}"/>')

    def legend(self, x: float, y: float, entries: Sequence[tuple[str, str]], step: float = 190) -> None:
        """Name the colors, each as (color, text), from left to right."""
        for i, (color, text) in enumerate(entries):
            self.box(x + i * step, y - 10, 12, 12, color)
            self.text(x + i * step + 18, y, text, "soft")

    def render(self) -> str:
        card = (
            f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="8" class="card edge-line"/>'
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" role="img">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{STYLE}{STYLE_DARK}</style>",
                card,
                *self._shapes,
                "</svg>\n",
            ]
        )
