"""The same model by way of transformers: importing stepwell is all its Auto classes need.

python examples/pipeline.py image.jpg "How much is the total?"
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import pipeline

import stepwell  # noqa: F401  (registers the model with the Auto classes)
from stepwell.folders import SHIPPED

ask = pipeline("image-text-to-text", model=str(SHIPPED))
message = {
    "role": "user",
    "content": [{"type": "image", "image": Path(sys.argv[1])}, {"type": "text", "text": sys.argv[2]}],
}
(answer,) = ask(text=[message], max_new_tokens=32, return_full_text=False)
print(answer["generated_text"])
