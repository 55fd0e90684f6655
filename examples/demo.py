"""The shipped model asked about a scanned receipt and a drawn page; `make demo` runs it.

    python examples/demo.py [views.png]

Prints every answer beside what is printed on the page, with its time, and draws what the model was given.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from transformers.utils import logging

import stepwell
from stepwell.views.sheet import write_views

HERE = Path(__file__).parent
WHOLE = None
PAGES = {  # question, region that is looked at closely, what is printed
    "receipt.jpg": [  # scanned
        ("How much is the total?", WHOLE, "27.30"),
        ("What is written here?", (656, 787, 802, 828), "30-06-16"),
        ("What is written here?", (198, 687, 694, 732), "INVOICE NO : 17714/102/T0382"),
    ],
    "drawn_page.png": [  # made by stepwell.reader.drawn; see README.md
        ("Which company issued this receipt?", WHOLE, "IP KAIYONG PHARMACY"),
        ("What is the date on this receipt?", WHOLE, "14-11-23"),
        ("What is written here?", (18, 245, 253, 275), "INV DATE: 14-11-23"),
    ],
}


def main(target: Path) -> None:
    logging.disable_progress_bar()
    started = time.perf_counter()
    model = stepwell.load()
    print(f"model loaded in {time.perf_counter() - started:.1f} s")
    for name, questions in PAGES.items():
        layout = model.layout(HERE / name)
        height, width = layout.image_size
        print(f"\n{name}: {width} x {height} px, {layout.num_visual} visual tokens")
        for question, region, printed in questions:
            started = time.perf_counter()
            answer = model.ask(HERE / name, question, region=region)
            seconds = time.perf_counter() - started
            where = "" if region is WHOLE else f"  {region}"
            print(f"  {question}{where}\n    {answer!r} (printed: {printed!r}), {seconds:.2f} s")
    images = [stepwell.open_image(HERE / name) for name in PAGES]
    write_views(target, images, model.processor.geometry)
    print(f"\nwhat the model saw: {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "views.png"))
