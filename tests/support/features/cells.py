"""What is known of a feature on each engine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """What is known of one feature on one engine.

    ``tests`` are names, ``file.function``, and ``starts`` those of ``tests.support.matrix`` that they make. ``message``
    is quoted from ``source``, a file of ours or of the engine.
    """

    verdict: str
    why: str = ""
    tests: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()
    message: str = ""
    source: str = ""

    def text(self) -> str:
        tests = " ".join(f"`{name}`" for name in (*self.tests, *self.starts))
        message = f"“{self.message}”" if self.message else ""
        return f"**{self.verdict}**: " + "; ".join(part for part in (tests, message, self.why) if part)


@dataclass(frozen=True)
class Feature:
    """A row: the flags that belong to it, by engine and without their dashes, and what is known."""

    name: str
    vllm: Cell
    sglang: Cell
    vllm_flags: str = ""
    sglang_flags: str = ""

    def cell(self, engine: str) -> Cell:
        return self.vllm if engine == "vllm" else self.sglang

    def flags(self, engine: str) -> list[str]:
        return (self.vllm_flags if engine == "vllm" else self.sglang_flags).split()


def tested(*tests: str, starts: str = "", why: str = "") -> Cell:
    return Cell("tested", why, tests, tuple(starts.split()))


def expected(why: str) -> Cell:
    return Cell("expected", why)


def refused(message: str, source: str, why: str = "") -> Cell:
    return Cell("refused", why, message=message, source=source)


GPU = expected("the engine's own, for GPUs; not run")
OTHER_LAYERS = expected("no effect: it is for layers that this model does not have")
NONE = expected("the engine has no such flag")
ANSWERS = "test_logprobs.test_float32"
