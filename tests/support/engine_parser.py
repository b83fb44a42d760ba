"""The argument parser of the engine's server."""

import argparse
from functools import cache

from tests.support.installed import ENGINE

COMMANDS = {"vllm": ("vllm", "serve"), "sglang": ("python", "-m", "sglang.launch_server")}
COMMAND = COMMANDS[ENGINE]


@cache
def parser() -> argparse.ArgumentParser:
    """Return the parser of what follows ``COMMAND``."""
    if ENGINE == "vllm":
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        return make_arg_parser(FlexibleArgumentParser())
    from sglang.srt.server_args import ServerArgs

    made = argparse.ArgumentParser()
    ServerArgs.add_cli_args(made)
    return made
