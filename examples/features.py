"""What the vision system makes of an image: a feature map of every view, and tokens for the language model.

python examples/features.py image.jpg
"""

from __future__ import annotations

import sys

import stepwell

features = stepwell.load().features(sys.argv[1])
for view in features.layout.views:
    print(f"view {view.name}: {view.size[1]} x {view.size[0]} px, {view.grid[1]} x {view.grid[0]} cells")
for feature_map in features.maps:
    print(f"map of {feature_map.view.name}, stride {feature_map.stride:g}: {tuple(feature_map.map.shape)}")
print(f"visual tokens: {tuple(features.tokens.shape)}")
