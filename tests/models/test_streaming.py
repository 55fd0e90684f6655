"""Streamed data on two processes: rows of pixels are no samples, and a step equals that of one process."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import os
import sys
import torch
from PIL import Image
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, Trainer, TrainingArguments

from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.plain import PlainConfig

folder, batch = sys.argv[1], int(sys.argv[2])
vision = PlainConfig(encoder="vit_nano", size=32, framing="aspect", arguments={"depth": 1}, select_layer=-1)
text = LlamaConfig(
    vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)
torch.manual_seed(0)
model = StepwellForConditionalGeneration(StepwellConfig(vision, text, image_token_id=19))
processor = StepwellImageProcessor(vision)


class Stream(IterableDataset):
    def __iter__(self):
        for i, size in enumerate([(40, 20), (20, 40), (30, 30), (20, 60)]):
            yield processor(Image.new("RGB", size, (60 * i, 10, 200)))


def collate(samples):
    inputs = {name: torch.cat([s[name] for s in samples]) for name in ("pixel_values", "image_sizes")}
    counts = [layout.num_visual for layout in model.model.layouts(inputs["image_sizes"])]
    rows = [[19] * count + [3, 4, 5] + [1] * (max(counts) - count) for count in counts]
    ids = torch.tensor(rows)
    return {**inputs, "input_ids": ids, "labels": torch.where((ids > 2) & (ids < 6), ids, -100)}


arguments = TrainingArguments(
    output_dir=folder, max_steps=1, per_device_train_batch_size=batch, learning_rate=0.1, optim="sgd",
    max_grad_norm=0.0, lr_scheduler_type="constant", use_cpu=True, report_to="none", save_strategy="no",
    remove_unused_columns=False, accelerator_config={"dispatch_batches": False}, disable_tqdm=True,
    dataloader_pin_memory=False, average_tokens_across_devices=False,
)
trainer = Trainer(model, arguments, train_dataset=Stream(), data_collator=collate)
trainer.train()
trainer.save_model(folder)
if torch.distributed.is_initialized():
    os._exit(0)  # a thread of gloo that drops a tensor after the interpreter's end aborts the process
"""


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch, *, processes: int) -> dict[str, torch.Tensor]:
    """The weights after one step on four images of four sizes."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    arguments = [str(script), str(folder), str(4 // processes)]
    if processes == 1:
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(script))
    else:
        result = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert result.returncode == 0, result.stderr[-3000:]
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (trained(tmp_path / str(n), monkeypatch, processes=n) for n in (1, 2))
    assert one.keys() == two.keys()
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, rtol=1e-5, atol=1e-6, msg=name)
