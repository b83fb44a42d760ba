"""The ``qnext`` command."""

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from qnext_plugin import __version__
from qnext_plugin.cli import bench, checkpoint, doctor, plan, verify

_COMMANDS = (bench, checkpoint, doctor, plan, verify)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command; tools that generate shell completions use it too."""
    parser = _Parser(prog="qnext", description="Tools for serving Qwen3-Next with qnext-plugin.")
    parser.add_argument("--version", action="version", version=f"qnext {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; a user's mistake prints one line to stderr and returns 2.

    A command that sets ``flags`` gets all arguments that it does not know; they are an engine's.
    """
    args, flags = parser().parse_known_args(argv)
    if flags and not hasattr(args, "flags"):
        parser().error(f"unrecognized arguments: {' '.join(flags)}")
    args.flags = flags
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that engines are stopped before the exit
    try:
        return int(args.run(args) or 0)
    except (ValueError, OSError) as e:
        print(f"qnext: error: {e}", file=sys.stderr)
        return 2
