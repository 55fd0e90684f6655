"""The command line. Each command calls what a program would call, with the same argument names.

Only typer and the standard library are imported above: what needs no model (help, a missing file, an empty
question) is answered at once, and torch is imported after all of that. A refusal is one line on standard
error and exit code 2; `stepwell --traceback COMMAND ...` shows where it came from. Pictures that `predict`
cannot read are exit code 1, when all others are done. A fault of ours is a traceback, a line that asks for a
report, and exit code 1. Standard streams may be closed, full, or take ASCII
only.
"""

from __future__ import annotations

import io
import os
import re
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from stepwell.commands.ask import ask
from stepwell.commands.compare import compare
from stepwell.commands.convert import convert
from stepwell.commands.costs import flops, plan
from stepwell.commands.data import data
from stepwell.commands.demo import demo
from stepwell.commands.doctor import doctor
from stepwell.commands.draw import draw
from stepwell.commands.evaluate import evaluate
from stepwell.commands.export import export
from stepwell.commands.extract import extract
from stepwell.commands.look import look
from stepwell.commands.names import list_names
from stepwell.commands.predict import predict
from stepwell.commands.serve import serve
from stepwell.commands.train import train
from stepwell.ops.memory import is_about_memory
from stepwell.version import __version__

__all__ = ["app", "main", "run"]

FAULT = 1
REFUSED = 2
INTERRUPTED = 130

app = typer.Typer(
    name="stepwell",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's panels would double the time --help takes
)


def run() -> int:
    """The command of this process; returns its exit code."""
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        code = _say("interrupted", INTERRUPTED)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # Whatever is still unwritten goes nowhere, or Python would complain about it on its way out.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def main(arguments: list[str]) -> int:
    """Run one command and return its exit code: 0; 2 for a refusal, 130 for Ctrl-C, 1 for pictures that
    cannot be read, for a fault of ours or if our reader left.
    """
    _prepare_streams()
    try:
        code = app(args=arguments, prog_name="stepwell", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        return FAULT
    except TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "stepwell"
        message = _one_line(error.format_message()).replace("Value error, ", "").rstrip(".")
        return _say(f"{message[:1].lower()}{message[1:]} (see '{command} --help')", REFUSED)
    except Exception as error:
        if "--traceback" in arguments:
            raise
        if _is_refusal(error):
            return _say(_reason(error), REFUSED)
        with suppress(OSError):
            traceback.print_exception(error)
        return _say(
            "a fault of stepwell, not of what it was given: please report it, with the lines above", FAULT
        )
    return _say("interrupted", INTERRUPTED) if code == INTERRUPTED else int(code or 0)


def _prepare_streams() -> None:
    """What is closed reads and writes nothing; what a stream cannot encode is written as an escape."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # in this order each takes the number of its own, before another file can
            setattr(
                sys,
                name,
                os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8", errors="backslashreplace"),
            )
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_refusal(error: Exception) -> bool:
    """What the machine or the user's files refuse, or what our code refuses in so many words: everything else
    is a mistake in it.
    """
    if isinstance(error, OSError | ImportError | UnicodeError) or is_about_memory(error):
        return True
    if _is_about_space(error):
        return True
    ours = Path(_raised_in(error)).is_relative_to(Path(__file__).parent)
    return ours and isinstance(error, ValueError | RuntimeError)


def _raised_in(error: Exception) -> str:
    """The file; of an error of a process that concurrent.futures began, the one that its traceback names."""
    elsewhere = re.findall(r'^  File "(.+)", line \d+', str(error.__cause__ or ""), re.MULTILINE)
    if type(error.__cause__).__name__ == "_RemoteTraceback" and elsewhere:
        return str(elsewhere[-1])
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_filename


def _is_about_space(error: Exception) -> bool:
    """Libraries in other languages have errors of their own."""
    return "No space left on device" in str(error)


def _say(line: str, code: int) -> int:
    with suppress(OSError):  # the exit code says it too
        print(f"stepwell: {line}", file=sys.stderr)
    return code


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"no such file: {error.filename}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
    if is_about_memory(error):
        return "not enough memory"
    if _is_about_space(error):
        return "no space left on device"
    return _one_line(error) or type(error).__name__


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"stepwell {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where a refusal came from.")] = False,
) -> None:
    """Read big images well and cheaply."""
    if context.invoked_subcommand is None:
        print(context.get_help())


COMMANDS = (
    *(ask, data, draw, train, evaluate, compare, predict, extract),
    *(serve, demo, convert, export, flops, plan, look, doctor),
)
for command in COMMANDS:
    app.command()(command)
app.command("list")(list_names)
