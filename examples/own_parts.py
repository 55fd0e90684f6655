"""A multimodal model from parts: an encoder, a language model and its tokenizer, each from a folder.

python examples/own_parts.py      docs/own_parts.md tells the same with published parts
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ViTConfig, ViTModel

import stepwell
from stepwell.train.run import train

# Small stand-ins for what you would download: a ViT-S/16 and a Llama with its tokenizer.
ViTModel(ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)).save_pretrained("vit")
raw = Tokenizer(
    models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
)
raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<pad>")
tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
tokenizer.save_pretrained("llama")
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained("llama")

Image.new("RGB", (400, 300), "red").save("red.png")
turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "red"}]
Path("mine.json").write_text(json.dumps([{"image": "red.png", "conversations": turns}]))

Path("mine.yaml").write_text("""
name: mine
bf16: false
workers: 0
model:
  vision:
    kind: piip
    framing: aspect
    branches:
      - {encoder: deit_s, size: 112, interactions: [[0, 5], [6, 11]]}
      - {encoder: deit_t, size: 224, interactions: [[0, 5], [6, 11]]}
  parts: {vision.branches.0: vit, language: llama}
  template: qwen
stages:
  - {name: align, steps: 2, batch: 1, train: [projector], data: [{kind: conversations, path: mine.json}]}
  - {name: tune, steps: 20, batch: 1, optimiser: {lr: 5.0e-4}, data: [{kind: conversations, path: mine.json}]}
""")
print(stepwell.load(train("mine.yaml")).ask("red.png", "Which colour?"))
