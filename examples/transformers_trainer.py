"""GSMAdamW in the Transformers Trainer, then its own AdamW with the masks: a small GPT-2 on Python's manual.

pip install transformers accelerate
python examples/transformers_trainer.py [STEPS]
"""

import pydoc_data.topics
import sys
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from gsm_sgd import GSMAdamW, keep_masked, parameter_groups, sparsity_table
from gsm_sgd.callbacks import TransformersCallback

LENGTH = 64


def main(steps: str = "500") -> None:
    """Train, and show that exactly Q of the blocks' weights are left."""
    text = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()))
    pieces = [{"input_ids": piece, "labels": piece} for piece in text.split(LENGTH)[:-1]]
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))

    groups = parameter_groups(model, weight_decay=0.01, dense=["embeddings"])  # one of them is the head as well
    optimizer = GSMAdamW(groups, lr=2e-3, compression=10)
    print(optimizer.summary)
    callback = TransformersCallback(fade=0.2)  # of the steps, which the Trainer counts
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=int(steps), per_device_train_batch_size=16, use_cpu=True, report_to="none",
            save_strategy="no", logging_steps=max(1, int(steps) // 10),
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=pieces, optimizers=(optimizer, None), callbacks=[callback]).train()
        finetuning = Trainer(model, arguments, train_dataset=pieces)
        keep_masked(finetuning.create_optimizer(), callback.masks, model)
        finetuning.train()

    rows = [row for row in sparsity_table(model) if row.name in callback.masks]
    print(f"{sum(row.nonzeros for row in rows):,} of {sum(row.params for row in rows):,} of the blocks' weights")


if __name__ == "__main__":
    main(*sys.argv[1:])
