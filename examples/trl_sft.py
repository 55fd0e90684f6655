"""TRL goes on training an assistant's folder: images stand in the messages, in either way of writing them.

python examples/trl_sft.py [FOLDER] [STEPS]      without a folder, the shipped model
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import stepwell
from stepwell.folders import SHIPPED

IMAGES = Path(__file__).parent
QUESTION = "Which company issued this receipt?"


def conversation(image: dict[str, object], answer: str) -> dict[str, object]:
    question = {"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return {"messages": [question, said], "images": []}  # the column tells TRL that there are images


page = (IMAGES / "drawn_page.png").read_bytes()
receipt = base64.b64encode((IMAGES / "receipt.jpg").read_bytes()).decode()
rows = [
    conversation({"type": "image", "image": {"bytes": page}}, "IP KAIYONG PHARMACY"),
    conversation(
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{receipt}"}}, "99 SPEED MART S/B"
    ),
]
trainer = SFTTrainer(
    model=str(sys.argv[1] if len(sys.argv) > 1 else SHIPPED),
    args=SFTConfig(
        "trl_sft",
        max_steps=int(sys.argv[2]) if len(sys.argv) > 2 else 2,
        per_device_train_batch_size=2,
        assistant_only_loss=True,  # TRL's loss over all tokens would count placeholders as targets
        max_length=None,  # none is cut through an image
        logging_steps=1,
        report_to="none",
        bf16=False,
    ),
    train_dataset=Dataset.from_list(rows),
)
trainer.train()
trainer.save_model("trl_sft/model")  # with the processor
print(stepwell.load("trl_sft/model").ask(IMAGES / "drawn_page.png", QUESTION))
