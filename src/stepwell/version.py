"""The version of this package, which is told also where its source runs without being installed."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
