"""Help and errors of every ``qnext`` command."""

import argparse
import json
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from qnext_plugin.cli import main, parser

MODEL_COMMANDS = ("plan", "verify --engine vllm", "bench --engine vllm --against none")


def commands(parent: Any) -> Iterator[Any]:
    """Every parser below ``parent`` that runs something."""
    groups = [action for action in parent._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield parent
    for group in groups:
        for child in group.choices.values():
            yield from commands(child)


COMMANDS = {command.prog: command for command in commands(parser())}


def test_help_lists_each_command_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = parser().format_help().splitlines()
    listed = [line for line in lines if line.startswith("    ") and line.split()[0].islower()]
    assert [line.split()[0] for line in listed] == ["plan", "doctor", "verify", "bench", "checkpoint"]
    assert all(len(line.split()) > 3 for line in listed)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_each_argument_and_ends_with_examples(name: str) -> None:
    command = COMMANDS[name]
    assert command.description and all(action.help for action in command._actions)
    assert "%(" not in command.format_help()
    assert command.examples and command.format_help().endswith(f"  {command.examples[-1]}\n")


@pytest.mark.parametrize("line", [line for command in COMMANDS.values() for line in command.examples])
def test_example_is_accepted_by_its_parser(line: str) -> None:
    program, *arguments = shlex.split(line)
    assert program == "qnext"
    found, rest = parser().parse_known_args(arguments)
    assert not rest and line in COMMANDS[found.command].examples


def error(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """The one line that a command prints before it returns 2."""
    try:
        status: Any = main(shlex.split(line))
    except SystemExit as e:  # argparse
        status = e.code
    out, err = capsys.readouterr()
    assert status == 2 and not out and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    "line",
    [
        "plan",
        "plan x/y --gpu-memory much",
        "plan x/y --frobnicate",
        "plan . --mtp 9",
        "doctor --engine none",
        "verify x/y --engine none",
        "bench x/y --engine vllm --pairs 0",
        "checkpoint demo /dev/null",
        "checkpoint demo x --frobnicate",
        "checkpoint random x --set y",
        "checkpoint random x --layers 0",
        "checkpoint quantize no-such-directory x --format awq",
        "checkpoint quantize x y --format none",
        "checkpoint index no-such-directory",
    ],
)
def test_error_begins_with_the_command(line: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = next(name for name in COMMANDS if f"qnext {line} ".startswith(f"{name} "))
    assert error(capsys, line).startswith(f"{name}: error: ")


@pytest.mark.parametrize(("line", "message"), [("frobnicate", "invalid choice"), ("", "required: COMMAND")])
def test_error_without_a_command(line: str, message: str, capsys) -> None:
    shown = error(capsys, line)
    assert shown.startswith("qnext: error: ") and message in shown


@pytest.mark.parametrize("command", MODEL_COMMANDS)
@pytest.mark.parametrize("config", [None, "", "{", json.dumps({"model_type": "llama"})])
def test_model_that_is_none_is_one_line(command, config, tmp_path, monkeypatch, capsys) -> None:
    for module in ("verify", "bench"):
        monkeypatch.setattr(f"qnext_plugin.cli.{module}.find_spec", lambda name: True)
    model = tmp_path / "model"
    if config is not None:
        model.mkdir()
        if config:
            (model / "config.json").write_text(config)
    name, *options = command.split()
    message = error(capsys, shlex.join([name, str(model), *options]))
    assert message.startswith(f"qnext {name}: error: ")
    assert ("neither a local directory nor a name on the hub" if config is None else "config.json") in message


def test_an_engine_that_fails_is_the_same_form_and_status_1(tmp_path, monkeypatch, capsys) -> None:
    from qnext_plugin.cli import bench
    from qnext_plugin.engines.process import EngineFailed

    (tmp_path / "log").write_text("the end of the log\n")

    def fail(args: argparse.Namespace) -> list[Any]:
        raise EngineFailed("the engine died", tmp_path / "log")

    monkeypatch.setattr(bench, "chosen_sides", fail)
    assert main(["bench", "MODEL", "--engine", "vllm"]) == 1
    assert capsys.readouterr().err == "qnext bench: error: the engine died\nthe end of the log\n"
