"""`make bench`: every comparison in one run, printed as the tables that results.md keeps.

Under 25 minutes without LLaVA-UHD (upsample, windows, uhd), INF-LLaVA (inf-llava) and detectors, some of
whose peers take minutes a run, and without the twenty exported graphs (graph for), some 45 seconds each.

    python benchmarks/run.py [WORD ...]     only the rows whose table or name holds all of the words
                                            (deform, upsample, windows, uhd, inf-llava, piip, detectors,
                                            tiles, turns, runtimes, memory, user, ask, serve, imports;
                                            training, openvino)

Rows are appended to latest.md as they come. Run it on a quiet machine. Ratios above 1 say that ours is the
faster; times are of this machine, today.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ask
import deform_attn
import detectors
import imports
import piip_backbone
import runtimes
import serving
import tiles
import turns
import upsample
import windows
from measure import HEADER, machine

import inf
import uhd

LATEST = Path(__file__).with_name("latest.md")
SECTIONS = {
    "deform": ("Deformable attention; other: eager grid_sample", HEADER, deform_attn.rows()),
    "upsample": (
        "Inverse pyramid; other: F.unfold and einsum, with the same weights",
        HEADER,
        upsample.rows(),
    ),
    "uhd": ("LLaVA-UHD v2; other: plain parts with the same weights, view by view", HEADER, uhd.rows()),
    "inf-llava": ("INF-LLaVA; other: crops one by one, 19 passes, with the same weights", HEADER, inf.rows()),
    "piip": ("PIIP; other: a plain peer with the same weights", HEADER, piip_backbone.rows()),
    "detectors": (
        "Detectors; other: torchvision's Mask R-CNN, and DINO with grid_sample, with the same weights",
        HEADER,
        detectors.rows(),
    ),
    "detectors-memory": (
        "Peak memory of one image under a detector, GiB",
        "| detector | ours | peer | ours / peer |\n| --- | --- | --- | --- |",
        detectors.memory_rows(),
    ),
    "tiles": (
        "Pictures in tiles; other: the tiles as pictures, one by one",
        HEADER,
        tiles.rows(),
    ),
    "tiles-memory": (
        "Peak memory of `stepwell predict --tiles`, the whole process, GiB",
        "| picture | GiB | at most |\n| --- | --- | --- |",
        tiles.memory_rows(),
    ),
    "windows": (
        "Window attention; other: every cell projected, RoIAlign and four passes of attention",
        HEADER,
        windows.rows(),
    ),
    "turns": (
        "Attention of turns apart; other: all pairs under its mask",
        HEADER,
        turns.rows(),
    ),
    "runtimes": (
        "Inference of the exported graph; 0.74x is 1.35 times OpenVINO's time, 0.91x is 1.1 times",
        HEADER,
        runtimes.rows(),
    ),
    "memory": (
        "Peak memory of one inference, GiB",
        "| PIIP | ours | peer | ours / peer |\n| --- | --- | --- | --- |",
        piip_backbone.memory_rows(),
    ),
    "user": (
        "User time of `stepwell ask` on the README's receipt; target: 1.6 times `import torch`, and 1 s",
        "| command | user s | import torch, user s | target | |\n| --- | --- | --- | --- | --- |",
        ask.user_rows(),
    ),
    "ask": (
        "`stepwell ask`, the whole process",
        "| command | seconds | peak memory |\n| --- | --- | --- |",
        ask.rows(),
    ),
    "serve": (
        "`stepwell serve`, close looks of a receipt, and the same questions in a plain loop",
        serving.LOAD_HEADER,
        serving.rows(),
    ),
    "serve-overload": (
        "`stepwell serve` with ten times as many clients as places, for half a minute",
        serving.OVERLOAD_HEADER,
        serving.overload_rows(),
    ),
    "imports": (
        "Imports, each package with what it imports, so that columns overlap",
        imports.HEADER,
        imports.rows(),
    ),
}


def main(words: list[str]) -> int:
    chosen = {
        section: [row for row in rows if all(word.lower() in f"{section} {row[0]}".lower() for word in words)]
        for section, (_, _, rows) in SECTIONS.items()
    }
    if not any(chosen.values()):
        print(f"no row holds {' '.join(words)!r}; tables: {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    failed = False
    try:
        _tell(machine())
        for section, rows in chosen.items():
            title, header, _ = SECTIONS[section]
            if rows:
                _tell(f"\n## {title}\n\n{header}")
            for name, lines in rows:
                try:
                    for line in lines():
                        _tell(line)
                except (RuntimeError, ValueError, OSError, subprocess.CalledProcessError) as error:
                    failed = True
                    _tell(f"| {name} | failed: {error} |")
        _tell("")
    except KeyboardInterrupt:
        print(f"\ninterrupted; the rows so far are in {LATEST}", file=sys.stderr)
        return 130
    return int(failed)


def _tell(line: str) -> None:
    print(line, flush=True)
    with LATEST.open("a", encoding="utf-8") as file:  # one write each: an interrupted bench keeps whole lines
        file.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
