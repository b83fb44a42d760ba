"""Draw how it works: the order of a projection's rows, and where states are kept."""

from bench.svg import Drawing

SECTIONS = {"q": "a", "k": "b", "v": "c", "z": "d"}


def row_order() -> str:
    """The rows of ``in_proj_qkvz``, grouped by key head and flat, for two key heads with two value heads each."""
    grouped = ["q1", "k1", "v1", "v2", "z1", "z2", "q2", "k2", "v3", "v4", "z3", "z4"]
    flat = sorted(grouped, key=lambda name: ("qkvz".index(name[0]), name))
    figure = Drawing(760, 330, "The rows of in_proj_qkvz in the checkpoint and in the model")
    figure.text(24, 32, "Rows of in_proj_qkvz, for two key heads with two value heads each", style="bold")
    width, height, top, bottom = 54, 34, 88, 208

    def at(order: list[str], name: str) -> float:
        """The left edge of a head's rows; groups and sections stand apart."""
        place = order.index(name)
        gaps = place // 6 if order is grouped else list(SECTIONS).index(name[0]) / 3
        return 36 + place * width + gaps * 30

    for name in grouped:
        x, below = at(grouped, name) + width / 2, at(flat, name) + width / 2
        figure.line([(x, top + height), (x, top + height + 8), (below, bottom - 8), (below, bottom)], SECTIONS[name[0]])
    for order, y in ((grouped, top), (flat, bottom)):
        for name in order:
            figure.box(at(order, name) + 1, y, width - 2, height, SECTIONS[name[0]])
            figure.text(at(order, name) + width / 2, y + 22, name, "on", anchor="middle", style="bold")
    figure.text(36, top - 12, "checkpoint: key head 1 and its value heads", "soft")
    figure.text(at(grouped, "q2"), top - 12, "key head 2 and its value heads", "soft")
    figure.text(at(flat, "q1") + width / 2 + 8, bottom - 12, "model:", "soft")
    for section, title in {"q": "all q", "k": "all k", "v": "all v", "z": "all z"}.items():
        names = [name for name in flat if name[0] == section]
        first, last = at(flat, names[0]), at(flat, names[-1]) + width
        figure.text((first + last) / 2, bottom + height + 18, title, "soft", anchor="middle")
        middle = (first + last) / 2
        figure.line([(first + 2, bottom + height + 28), (middle - 2, bottom + height + 28)], "ink", width=3)
        figure.line([(middle + 2, bottom + height + 28), (last - 2, bottom + height + 28)], "gray", width=3)
    y = bottom + height + 54
    figure.line([(36, y - 4), (60, y - 4)], "ink", width=3)
    figure.text(68, y, "share of rank 0 of 2", "soft")
    figure.line([(220, y - 4), (244, y - 4)], "gray", width=3)
    figure.text(252, y, "share of rank 1: whole heads of every section", "soft")
    return figure.render()


def state_cache() -> str:
    """One pool of equal pages on vLLM, two pools on SGLang; a sequence with two drafts and a kept prefix."""
    figure = Drawing(760, 400, "Where vLLM and SGLang keep states")
    figure.text(24, 32, "One sequence with two drafts and prefix caching", style="bold")
    figure.legend(24, 58, [("a", "state in use"), ("c", "state kept for a prefix"), ("b", "state after a draft")], 190)
    figure.legend(24 + 3 * 190, 58, [("gray", "keys and values")])

    figure.text(24, 96, "vLLM: one pool of pages of equal size", style="bold")
    pages = [("a", "state"), ("c", "prefix"), ("b", "draft 1"), ("b", "draft 2")]
    pages += [("gray", f"tokens {i}") for i in "123"]
    _row(figure, 24, 108, 82, 54, pages)
    figure.text(24 + 7 * 84 + 8, 140, "free ...", "soft")
    figure.text(
        24, 182, "An attention block is made long enough to hold a state: 144 to 1,088 tokens on the 80B.", "soft"
    )

    figure.text(24, 222, "SGLang: a pool of state slots, and a pool of tokens", style="bold")
    _row(figure, 24, 234, 70, 54, [("a", "state"), ("c", "prefix"), ("c", "prefix")])
    figure.text(24 + 3 * 72 + 6, 266, "free ...", "soft")
    figure.text(24, 308, "slots: 3, or 5 with overlapping", "soft")
    figure.text(24, 324, "scheduling", "soft")
    _row(figure, 306, 234, 70, 54, [("b", "token"), ("b", "draft 1"), ("b", "draft 2")])
    figure.text(306, 308, "beside the pool, while verifying", "soft")
    for i in range(12):
        figure.box(556 + 15 * i, 234, 13, 54, "gray")
    figure.text(556, 308, "tokens, one by one", "soft")
    figure.text(
        24,
        354,
        "After a step, the state after the last accepted token is the state in use. Every token changes",
        "soft",
    )
    figure.text(
        24, 372, "the state, and it cannot be computed back: drafts and kept prefixes need separate copies.", "soft"
    )
    return figure.render()


def _row(figure: Drawing, x: float, y: float, width: float, height: float, pages: list[tuple[str, str]]) -> None:
    """Draw pages beside each other, each as (color, text)."""
    for i, (color, text) in enumerate(pages):
        figure.box(x + i * (width + 2), y, width, height, color)
        ink = "ink" if color == "gray" else "on"
        figure.text(x + i * (width + 2) + width / 2, y + height / 2 + 5, text, ink, anchor="middle")
