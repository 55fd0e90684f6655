"""The command line. Each command calls what a program would call, with the same argument names.

Only typer and the standard library are imported above: what needs no model (help, a missing file, an empty
question) is answered at once, and torch is imported after all of that. A refusal is one line on standard
error and exit code 2; `stepwell --traceback COMMAND ...` shows where it came from.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from stepwell.commands.ask import ask

__all__ = ["app", "ask", "convert", "flops", "main", "plan", "run", "train"]

REFUSED = 2
INTERRUPTED = 130

AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]

app = typer.Typer(
    name="stepwell",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's panels would double the time --help takes
)


def run() -> int:
    """The command of this process; returns its exit code."""
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)


def main(arguments: list[str]) -> int:
    """Run one command and return its exit code: 0, 2 for a refusal, 130 for Ctrl-C, 1 if our reader left."""
    try:
        code = app(args=arguments, prog_name="stepwell", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whatever is still unwritten goes nowhere, or Python would complain about it on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "stepwell"
        message = _one_line(error.format_message()).replace("Value error, ", "").rstrip(".")
        return _say(f"{message[:1].lower()}{message[1:]} (see '{command} --help')", REFUSED)
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if "--traceback" in arguments:
            raise
        return _say(_reason(error), REFUSED)
    return _say("interrupted", INTERRUPTED) if code == INTERRUPTED else int(code or 0)


def _say(line: str, code: int) -> int:
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
    if isinstance(error, MemoryError):
        return "not enough memory"
    return _one_line(error) or type(error).__name__


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"stepwell {version('stepwell')}")
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


app.command()(ask)

# ---- train ----


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a field; may be repeated.")
    ] = None,
) -> None:
    """Train a model from a recipe."""
    _check_recipe(recipe)

    from stepwell.train.run import train as run

    print(f"trained: {run(recipe, overrides or [])}")


def _check_recipe(recipe: str) -> None:
    from stepwell.train.shipped import recipe_names

    names = recipe_names()
    if recipe not in names and not Path(recipe).is_file():
        raise ValueError(f"no recipe {recipe}: not a file, and not one of {', '.join(names)}")


# ---- convert ----


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A checkpoint, file or folder; with --dry-run a manifest."),
    ],
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="The new model folder.")] = None,
    as_: Annotated[str, typer.Option("--as", metavar="NAME", help="The published model it is.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only compare names and shapes: SOURCE is a JSON file of them.")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where its tokenizer is. [default: beside SOURCE]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, with every name.")] = False,
) -> None:
    """Turn a released checkpoint into a model folder."""
    if not as_:
        raise ValueError("say which published model it is: --as NAME")
    if not source.exists():
        raise ValueError(f"no such file or folder: {source}")
    if (out is None) != dry_run:
        raise ValueError(
            "--dry-run writes nothing, leave OUT out" if dry_run else "say which folder to write: OUT"
        )

    from stepwell.weights.convert import ConversionError
    from stepwell.weights.convert import convert as run
    from stepwell.weights.convert import dry_run as compare

    try:
        if out is None:
            report = compare(source, as_=as_)
        else:
            report = run(source, out, as_=as_, overwrite=overwrite, tokenizer=tokenizer)
        complaint = report.complaint()
    except ConversionError as error:
        report, complaint = error.report, str(error)
    print(json.dumps(report.json(), indent=2) if as_json else report.text())
    if complaint:
        raise ValueError(complaint)


# ---- flops, plan ----


@app.command()
def flops(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="A model folder, a recipe, or the name of a published model."),
    ] = None,
    paper: Annotated[bool, typer.Option("--paper", help="Rebuild the PIIP paper's cost tables.")] = False,
    size: Annotated[str | None, typer.Option(metavar="WIDTHxHEIGHT", help="[default: square]")] = None,
    as_json: AsJson = False,
) -> None:
    """Count what a model costs, as the papers count and as it is."""
    if paper == (config is not None):
        raise ValueError("name a model, or take --paper" if config is None else "--paper takes no model")
    from stepwell.flops.text import parse_size

    pixels = None if size is None else parse_size(size)
    from stepwell.flops import report, tables

    if config is None:
        print(tables.paper_table(as_json=as_json))
        return
    costs = report.report(_subject(config), size=pixels)
    print(report.report_as_json(costs) if as_json else report.report_as_table(costs))


def _subject(config: str) -> Any:
    """What a folder, a recipe or a published name stands for; a folder goes before a recipe of its name."""
    from stepwell.flops.report import find_subject
    from stepwell.train.shipped import recipe_names

    path = Path(config).expanduser()
    if path.is_dir() or not (config in recipe_names() or path.is_file()):
        return find_subject(config)
    from stepwell.train.recipe import load_recipe
    from stepwell.train.tasks import find_task

    recipe = load_recipe(path)
    return find_task(recipe.task).configuration(recipe)


@app.command()
def plan(
    branches: Annotated[str, typer.Option(metavar="FAMILY:SIZES", help="As clip:L+convnext_clip:B.")],
    budget_gflops: Annotated[float, typer.Option(help="In 1e9 multiply-accumulates, as the papers count.")],
    step: Annotated[int | None, typer.Option(min=1, help="Sizes are its multiples. [default: 112]")] = None,
    aspect: Annotated[str, typer.Option(metavar="WIDTH:HEIGHT", help="Of the images.")] = "1:1",
    slack: Annotated[float, typer.Option(min=0, help="Share of the budget that may be exceeded.")] = 0.01,
    interactions: Annotated[int, typer.Option(min=0, help="Between neighbouring branches.")] = 12,
    smallest: Annotated[int | None, typer.Option(min=1, help="Of branch 1. [default: one step]")] = None,
    windows: Annotated[int | None, typer.Option(min=0, help="0: none. [default: as published]")] = None,
    as_json: AsJson = False,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print as YAML, ready for a recipe.")] = False,
) -> None:
    """List the best image sizes for several encoders in a budget."""
    if as_json and as_yaml:
        raise ValueError("--json and --yaml exclude each other")

    from stepwell.flops import plan as planner

    plans = planner.plan(
        branches,
        budget_gflops,
        step=step,
        aspect=aspect,
        slack=slack,
        smallest=smallest,
        interactions=interactions,
        windows=windows,
    )
    if as_json:
        print(planner.plans_as_json(plans))
    else:
        print(planner.plans_as_yaml(plans) if as_yaml else planner.plans_as_table(plans))
