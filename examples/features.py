"""What the vision system makes of a picture: feature maps by stride, and tokens for the language model.

python examples/features.py picture.jpg
"""

from __future__ import annotations

import sys

import stepwell

features = stepwell.load().features(sys.argv[1])
for view in features.layout.views:
    print(f"view {view.name}: {view.size[1]} x {view.size[0]} px, {view.grid[1]} x {view.grid[0]} cells")
for stride, feature_map in features.maps.items():
    print(f"map of stride {stride}: {tuple(feature_map.shape)}")
print(f"visual tokens: {tuple(features.tokens.shape)}")
