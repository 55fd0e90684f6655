"""The shipped model goes on learning from a few questions about images of yours.

python examples/fine_tune.py [STEPS]      docs/fine_tune.md tells the same with files and commands
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import stepwell
from stepwell.train.run import train

IMAGES = Path(__file__).parent.resolve()
ASKED = {
    "receipt.jpg": {"Who sold this?": "99 SPEED MART", "When was it?": "30-06-16"},
    "drawn_page.png": {"Who sold this?": "IP KAIYONG PHARMACY", "When was it?": "14-11-23"},
}

entries = []
for image, answers in ASKED.items():
    turns = [
        turn
        for question, answer in answers.items()
        for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
    ]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    entries.append({"image": image, "conversations": turns})
Path("mine.json").write_text(json.dumps(entries))

recipe = {
    "name": "mine",
    "model": {"start": "reader_tiny"},
    "bf16": False,
    "workers": 0,
    "stages": [
        {
            "name": "answers",
            "steps": int(sys.argv[1]) if len(sys.argv) > 1 else 30,
            "batch": 2,
            "optimiser": {"lr": 1e-3},
            "schedule": {"warmup_steps": 0},
            "data": [{"kind": "conversations", "path": "mine.json", "images": str(IMAGES)}],
        }
    ],
}
Path("mine.yaml").write_text(json.dumps(recipe))  # JSON is YAML

model = stepwell.load(train("mine.yaml"))
for image, answers in ASKED.items():
    for question, answer in answers.items():
        print(f"{question} {model.ask(IMAGES / image, question)} (printed: {answer})")
