"""A question about an image.

python examples/ask.py image.jpg "How much is the total?"
"""

from __future__ import annotations

import sys

import stepwell

model = stepwell.load()
print(model.ask(sys.argv[1], sys.argv[2]))
