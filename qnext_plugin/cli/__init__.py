"""The ``qnext`` command."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from qnext_plugin import __version__
from qnext_plugin.cli import checkpoint

_COMMANDS = (checkpoint,)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a mistake of the user's prints one line to stderr and gives exit status 2."""
    parser = _Parser(prog="qnext", description="Tools for serving Qwen3-Next with qnext-plugin.")
    parser.add_argument("--version", action="version", version=f"qnext {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as e:
        print(f"qnext: error: {e}", file=sys.stderr)
        return 2
    return 0
