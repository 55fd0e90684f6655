"""The `stepwell` command's way in.

It stands beside the package, not in it, so that the package can tell that the command imports it: then
registering with transformers, which costs seconds, waits until a model is needed.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line of this process; returns the exit code: 0, 2 for a refusal, 130 for Ctrl-C."""
    try:
        from stepwell.cli import main as run

        return run(sys.argv[1:])
    except KeyboardInterrupt:
        print("stepwell: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
