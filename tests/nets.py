"""Small nets that tests train, and what they do with them."""

import io

import torch
from torch import nn
from torch.nn import functional as F


def dense_net(dtype=torch.float32, seed=0):
    """Return three linear layers, with 352 weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)


def conv_net(dtype=torch.float32, seed=0):
    """Return a convolution, a norm and a linear layer, with 108 and 64 weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)).to(dtype)


def channels_last_net():
    return conv_net().to(memory_format=torch.channels_last)


def backward(model, seed=0):
    """Compute the gradients of a net for the batch of a seed, and return the loss."""
    model.zero_grad()
    weight, generator = next(model.parameters()), torch.Generator().manual_seed(seed)
    images = torch.randn(32, *((12,) if weight.ndim == 2 else (3, 4, 4)), generator=generator).to(weight.dtype)
    logits = model(images).to(torch.promote_types(weight.dtype, torch.float32))
    loss = F.cross_entropy(logits, torch.randint(4, (32,), generator=generator))
    loss.backward()
    return loss


def train(model, optimizer, seeds):
    """Take a step for the batch of each seed."""
    for seed in seeds:
        backward(model, seed)
        optimizer.step()


def assert_same_bits(model, other):
    for (name, tensor), its in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, its), name


def kept_of(model):
    """Return how many weights of two dimensions or more are not zero."""
    return sum(int(p.count_nonzero()) for p in model.parameters() if p.ndim > 1)


def saved_and_loaded(state):
    """Return a state as a file brings it back that only tensors and numbers can be in."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
