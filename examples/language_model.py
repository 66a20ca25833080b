"""A small transformer language model from scratch, dense and with one weight in ten of its blocks, in plain PyTorch.

It learns the bytes of Python's own manual, which is part of Python (pydoc_data.topics). Embeddings and head are left
out of the choice.

    python examples/language_model.py [STEPS] [COMPRESSION]
"""

import math
import pydoc_data.topics
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsm_sgd import GSM, Schedule

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 64, 4, 2, 64, 32


class Transformer(nn.Module):
    """A decoder: bytes (batch, length) to logits (batch, length, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        block = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, **layer)
        self.blocks = nn.TransformerEncoder(block, LAYERS, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return for each place the logits of the byte that follows."""
        length = tokens.shape[1]
        hidden = self.bytes(tokens) + self.places.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.head(self.norm(self.blocks(hidden, mask, is_causal=True)))


def train(text: Tensor, steps: int, compression: float) -> tuple[Transformer, GSM]:
    """Train on random pieces of the text; at compression 1 this is SGD."""
    torch.manual_seed(0)
    model = Transformer()
    blocks = [(name, p) for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    others = [(name, p) for name, p in model.named_parameters() if not (name.startswith("blocks.") and p.ndim == 2)]
    groups = [{"params": blocks}, {"params": others, "prunable": False, "weight_decay": 0.0}]

    def late(share):
        """Return what share of the sparsity is reached: none until the net has learned to attend, which takes it long.

        The ramp is 60 % of the steps; in the first 35 % all weights are active.
        """
        return 1 - (1 - max(0.0, (0.6 * share - 0.35) / 0.25)) ** 3

    schedule = Schedule(steps, ramp=0.6, fade=0.1, cut=0.75, curve=late)
    optimizer = GSM(groups, lr=0.3, momentum=0.95, compression=compression, schedule=schedule)

    def factor(step):
        """Return a warm-up, then half a cosine."""
        return min(1.0, 20 * (step + 1) / steps) * (0.5 + 0.5 * math.cos(math.pi * step / steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1))
        pieces = text[starts + torch.arange(LENGTH + 1)]
        loss = F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model, optimizer


@torch.no_grad()
def bits_per_byte(model: Transformer, text: Tensor) -> float:
    """Return what it takes to encode text that the model has not seen."""
    model.eval()
    pieces = text[: len(text) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    losses = [F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()) for part in pieces.split(64)]
    return float(torch.stack(losses).mean()) / math.log(2)


def main(steps: str = "3000", compression: str = "10") -> None:
    """Train both, and show what each comes to on the last tenth of the text."""
    text = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()))
    seen, unseen = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    for ratio in (1.0, float(compression)):
        model, optimizer = train(seen, int(steps), ratio)
        masks = optimizer.finalize()
        kept = sum(int(model.get_parameter(name).count_nonzero()) for name in masks)
        bits = bits_per_byte(model, unseen)
        print(f"{ratio:g}x: {kept:,} of {optimizer.num_prunable:,} weights, {bits:.3f} bits per byte")


if __name__ == "__main__":
    main(*sys.argv[1:])
