"""INF-LLaVA's names -> ours.

The released code follows LLaVA for its projector: entries 0, 2, 4... of a Sequential, or plain `weight` and
`bias` where it is one linear layer. Ours has the same modules.
"""

from __future__ import annotations

from stepwell.keys.engine import Rename, Rule

__all__ = ["PROJECTOR"]

PROJECTOR: list[Rule] = [Rename(r"(?:\d+\.)?(?:weight|bias)", r"\g<0>")]
