"""Mistakes that an earlier trial's tests did not see, as mutants: (file, what it says, what it would say).

`run.py` tries them beside those that it draws. Each changes one place.
"""

from __future__ import annotations

BY_HAND = (
    # every part of many copies the first one's rows
    (
        "ops/parts.py",
        "result[:, start : start + step] = function(*part)",
        "result[:, start : start + step] = first[:, : part[0].shape[1]]",
    ),
    (
        "ops/double.py",
        "linear(lines, blocks, bias)",
        "linear(x.permute(0, 2, 3, 1)[:, : lines.shape[1]], blocks, bias)",
    ),
    ("ops/double.py", "most=max(1, MOST_CELLS // width)", "most=MOST_CELLS"),
    # softmax, and what it is taken of, in half precision
    ("layers/attention.py", "torch.promote_types(q.dtype, torch.float32)", "q.dtype"),
    (
        "layers/attention.py",
        "with without_autocast(v.device):\n        scores",
        "if True:\n        scores",
    ),
    ("fuse/interaction.py", "exact = torch.promote_types(query.dtype, torch.float32)", "exact = query.dtype"),
    ("fuse/interaction.py", ".softmax(2, dtype=exact)", ".softmax(2)"),
    ("ops/deform_attn.py", "torch.promote_types(value.dtype, torch.float32)", "value.dtype"),
    ("train/chat.py", "outputs.logits.float()", "outputs.logits"),
    # scales
    ("layers/attention.py", "q.shape[-1] ** -0.5", "q.shape[-1] ** 0.5"),
    ("layers/drop_path.py", "x * keep / (1 - self.rate)", "x * keep * (1 - self.rate)"),
    ("models/assistant.py", "logits = torch.tanh(logits / cap) * cap", "pass"),
    ("models/assistant.py", "logits = logits * scale", "logits = logits / scale"),
    ("models/assistant.py", "logits = logits / scale", "logits = logits * scale"),
    # weights of losses
    ("train/stage_trainer.py", "total = total + self.stage.losses[name] * loss", "total = total + loss"),
    ("train/stage_trainer.py", "sum(weight * means[name] for", "sum(means[name] for"),
    # the pointer's head
    ("reader/pointer.py", "rotary, pointed, head)", "rotary, pointed, 0)"),
    ("reader/pointer.py", "rotated(attention.k_proj, kv_head,", "rotated(attention.k_proj, 0,"),
    ("reader/task.py", "tap.loss(pointers, head=self.stage.pointer_head, ", "tap.loss(pointers, "),
    (
        "reader/task.py",
        "layers=stage.pointer_layers, head=stage.pointer_head",
        "layers=stage.pointer_layers, head=0",
    ),
    # seeds of stages
    ("train/run.py", "mixture(task, seed=settings.seed + i, ", "mixture(task, seed=settings.seed, "),
    ("train/run.py", "stage_folder, seed=settings.seed + i", "stage_folder, seed=settings.seed"),
    ("train/run.py", "seed=seed,\n        patience", "seed=0,\n        patience"),
    # padding
    (
        "views/preprocess.py",
        "left, top = (long - width) // 2, (long",
        "left, top = (long - width + 1) // 2, (long",
    ),
    (
        "views/preprocess.py",
        "left, top = (width - side) // 2, (height",
        "left, top = (width - side + 1) // 2, (height",
    ),
    (
        "views/pyramid.py",
        "left, top = -float((side - width) // 2)",
        "left, top = -float((side - width + 1) // 2)",
    ),
    ("ops/rearrange.py", "padded[:, :height, :width] = x", "padded[:, -height:, -width:] = x"),
    # placeholders are looked for in a prompt, and not at every step
    ("models/assistant.py", "return cache is None or input_ids.shape[1] > 1", "return True"),
    ("models/assistant.py", "return cache is None or input_ids.shape[1] > 1", "return False"),
    ("models/assistant.py", "return cache is None or input_ids.shape[1] > 1", "return cache is None"),
    # bad samples: who is caught, who comes instead, when and how often it counts
    ("data/sample.py", "except Exception as error:", "except ValueError as error:"),
    ("data/mixture.py", "(first + step) % length", "step % length"),
    ("train/stage_trainer.py", "step=self.state.global_step + 1)", "step=self.state.global_step)"),
    ("train/bad_samples.py", "count > size * self.limit / 100", "count >= size * self.limit / 100"),
    ("train/bad_samples.py", "if int(step) <= state.global_step", "if int(step) < state.global_step"),
    # boxes and maps of images that Exif turns
    ("data/coco.py", "orientation in (3, 4, 6, 7)", "orientation in (3, 4, 7, 8)"),
    ("data/label_maps.py", "labels = turned(labels, orientation)", "pass"),
    # what strangers may say
    ("language/messages.py", 'name[:5].lower() != "data:"', "False"),
    ("folders.py", 'key == "auto_map" or is_kernel', "is_kernel"),
    ("images/limits.py", "if value > getattr(self, name)", "if value >= getattr(self, name)"),
)
