"""GSM in the Transformers Trainer, then its own AdamW with the masks: a small GPT-2 on the bytes of Python's manual.

pip install transformers accelerate
python examples/transformers_trainer.py [STEPS]
"""

import pydoc_data.topics
import sys
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from gsm_sgd import GSM, Schedule, keep_masked
from gsm_sgd.masks import sparsity_rows

LENGTH = 64


def main(steps: str = "500") -> None:
    """Train, and show that exactly Q of the blocks' weights are left."""
    text = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()))
    pieces = [{"input_ids": piece, "labels": piece} for piece in text.split(LENGTH)[:-1]]
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))

    # the embedding, which is the head as well, is left out
    blocks = [(name, p) for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]
    others = [(name, p) for name, p in model.named_parameters() if not (".h." in name and p.ndim == 2)]
    total = int(steps)
    groups = [{"params": blocks}, {"params": others, "prunable": False, "weight_decay": 0.0}]
    optimizer = GSM(groups, 0.05, compression=10, weight_decay=5e-4, schedule=Schedule(total, fade=0.2))
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=total, per_device_train_batch_size=16, use_cpu=True, report_to="none",
            save_strategy="no", logging_steps=max(1, total // 10),
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=pieces, optimizers=(optimizer, schedule)).train()
        masks = optimizer.finalize()  # it has cut already: these are its masks; callbacks get it in a wrapper
        finetuning = Trainer(model, arguments, train_dataset=pieces)
        keep_masked(finetuning.create_optimizer(), masks, model)
        finetuning.train()

    rows = sparsity_rows(dict(blocks))
    print(f"{sum(row.nonzeros for row in rows):,} of {sum(row.params for row in rows):,} of the blocks' weights")


if __name__ == "__main__":
    main(*sys.argv[1:])
