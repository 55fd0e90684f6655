"""What differs between the settings of two runs, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["differences"]


def differences(kept: Mapping[str, Any], given: Mapping[str, Any], within: str = "") -> str:
    """What of the settings of a run, as JSON has them, was otherwise; those within others by both names.
    Empty where they are the same.
    """
    found = []
    for name in dict.fromkeys([*given, *kept]):
        was, now = kept.get(name), given.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            found.append(differences(was, now, f"{within}{name}."))
        elif was != now:
            found.append(f"{within}{name} was {_short(was)} and is {_short(now)}")
    return ", ".join(filter(None, found))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:30]}...{text[-25:]}"
