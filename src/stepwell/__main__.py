"""`python -m stepwell`, for launchers that start a module in several processes."""

from __future__ import annotations

from stepwell.cli import run

if __name__ == "__main__":
    raise SystemExit(run())
