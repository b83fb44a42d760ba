"""The ``qnext`` command."""

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from qnext_plugin import __version__
from qnext_plugin.cli import bench, checkpoint, doctor, plan, verify
from qnext_plugin.engines.process import EngineFailed

_COMMANDS = (plan, doctor, verify, bench, checkpoint)  # the order in which a user needs them


class _Parser(argparse.ArgumentParser):
    """A parser whose help ends with examples, and which every error message begins with the name of."""

    def __init__(self, *, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.examples = examples
        self.set_defaults(command=self.prog)  # that of the innermost command stays

    def format_help(self) -> str:
        shown = "".join(f"  {line}\n" for line in self.examples)
        return super().format_help() + (f"\nexamples:\n{shown}" if shown else "")

    def error(self, message: str) -> NoReturn:
        self.exit(2, _error(self.prog, f"{message} (see {self.prog} --help)"))


def _error(command: str, message: object) -> str:
    return f"{command}: error: {message}\n"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command; tools that generate shell completions use it too."""
    parser = _Parser(
        prog="qnext",
        description="Tools for Qwen3-Next with qnext-plugin. The engine's own command serves the model: vllm serve, or "
        "python -m sglang.launch_server.",
        epilog="qnext COMMAND --help explains a command and shows examples.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"qnext {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    An error is one message on stderr that begins with the command's name. The status is 2 for a user's mistake and 1
    if an engine failed. A command that sets ``flags`` gets all arguments that it does not know; they are an engine's.
    """
    args, flags = parser().parse_known_args(argv)
    if flags and not hasattr(args, "flags"):
        message = f"unrecognized arguments: {' '.join(flags)} (see {args.command} --help)"
        sys.stderr.write(_error(args.command, message))
        sys.exit(2)
    args.flags = flags
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that engines are stopped before the exit
    try:
        return int(args.run(args) or 0)
    except (ValueError, OSError) as e:
        sys.stderr.write(_error(args.command, e))
        return 2
    except EngineFailed as e:
        sys.stderr.write(_error(args.command, e))
        return 1
