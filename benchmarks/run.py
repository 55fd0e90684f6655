"""`make bench`: every comparison in one run, printed as the tables that results.md keeps. Under ten minutes.

Run it on a quiet machine. Ratios above 1 say that ours is the faster; times are of this machine, today.
"""

from __future__ import annotations

import ask
import deform_attn
import piip_backbone
from measure import machine


def main() -> None:
    print(f"{machine()}\n")
    print("| what | ours, ms | peer, ms | ratio |\n| --- | --- | --- | --- |")
    for row in deform_attn.run():
        print(row, flush=True)
    print("\n| PIIP | ours | peer | ratio |\n| --- | --- | --- | --- |")
    for line in piip_backbone.run():
        print(line, flush=True)
    print("\n| command | seconds | peak memory |\n| --- | --- | --- |")
    for line in ask.run():
        print(line, flush=True)


if __name__ == "__main__":
    main()
