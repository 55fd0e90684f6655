"""`stepwell doctor`: what is installed, what it runs on, whether the fast paths work here, what to do."""

from __future__ import annotations

from typing import Annotated

import typer

from stepwell.commands.loading import quieten
from stepwell.commands.printing import print_json

__all__ = ["doctor"]

UNWELL = 1
"""Exit code where a package is missing or does not fit, or a self-check failed."""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Look at this installation and this machine: packages, extras, devices, and whether fast paths work."""
    quieten()

    from stepwell.doctor.report import examine

    report = examine()
    if as_json:
        print_json(report.as_json(), indent=2)
    else:
        print(report.as_text())
    if not report.is_well:
        raise typer.Exit(UNWELL)
