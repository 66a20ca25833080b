"""The naive twin of selection and optimizer: one sort of everything, in float64.

It is written from the paper's equations and shares nothing with the package.
"""

import math

import torch
from torch import Tensor


def naive_active(scores: list[Tensor], k: int) -> list[Tensor]:
    """Return masks of the k largest scores, of which only those above zero count."""
    masks = naive_top(scores, k)
    return [mask & (score > 0) for mask, score in zip(masks, scores, strict=True)]


def naive_top(scores: list[Tensor], k: int) -> list[Tensor]:
    """Return masks of the k largest scores by a stable sort of all of them: ties to the lower index."""
    flat = torch.cat([score.reshape(-1).double() for score in scores])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.sort(descending=True, stable=True).indices[:k]] = True
    parts = chosen.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


class NaiveGSM:
    """T = |W g|; B = top Q of all T; Z <- beta Z + eta W + B g; W <- W - alpha Z."""

    def __init__(self, params, lr, compression, momentum, weight_decay, nesterov=False, passive_decay=None):
        self.params = list(params)
        self.lr, self.beta, self.eta, self.nesterov = lr, momentum, weight_decay, nesterov
        self.passive_eta = weight_decay if passive_decay is None else passive_decay
        self.kept = math.floor(sum(p.numel() for p in self.params if p.ndim >= 2) / compression)
        self.z = [torch.zeros_like(p) for p in self.params]

    def choose(self, scores):
        return naive_active(scores, self.kept)

    @torch.no_grad()
    def step(self):
        prunable = [p for p in self.params if p.ndim >= 2]
        scores = [(p * p.grad).abs() for p in prunable]
        everything = self.kept == sum(p.numel() for p in prunable)
        masks = iter(naive_top(scores, self.kept) if everything else self.choose(scores))
        for w, z in zip(self.params, self.z, strict=True):
            b = next(masks) if w.ndim >= 2 else torch.ones_like(w, dtype=torch.bool)
            eta = torch.full_like(w, self.passive_eta).masked_fill(b, self.eta)
            push = b * w.grad + eta * w
            z.copy_(self.beta * z + push)
            w.sub_(self.lr * (push + self.beta * z if self.nesterov else z))


class NaiveAdamW:
    """M <- b1 M + (1 - b1) B g; V <- b2 V + (1 - b2) g^2; W <- (1 - alpha eta) W - alpha M' / (sqrt(V') + eps)."""

    def __init__(self, params, lr, kept, passive_decay, weight_decay=1e-2, betas=(0.9, 0.999), eps=1e-8):
        self.params, self.lr, self.kept, self.eta, self.betas, self.eps = (
            list(params),
            lr,
            kept,
            weight_decay,
            betas,
            eps,
        )
        self.passive_eta = passive_decay
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.params]
        self.taken = [0] * len(self.params)

    def choose(self, scores):
        return naive_active(scores, self.kept)

    @torch.no_grad()
    def step(self):
        prunable = [p for p in self.params if p.ndim >= 2]
        masks = iter(self.choose([torch.zeros_like(p) if p.grad is None else (p * p.grad).abs() for p in prunable]))
        for number, (w, (first, second)) in enumerate(zip(self.params, self.moments, strict=True)):
            b = next(masks).to(w.dtype) if w.ndim >= 2 else torch.ones_like(w)
            if w.grad is None:
                w.mul_(1 - self.lr * self.passive_eta if w.ndim >= 2 else 1)
                continue
            self.taken[number] += 1
            first.copy_(self.betas[0] * first + (1 - self.betas[0]) * b * w.grad)
            second.copy_(self.betas[1] * second + (1 - self.betas[1]) * w.grad**2)
            m, v = (z / (1 - beta ** self.taken[number]) for z, beta in zip((first, second), self.betas, strict=True))
            decay = b * self.eta + (1 - b) * self.passive_eta
            w.copy_((1 - self.lr * decay) * w - self.lr * m / (v.sqrt() + self.eps))
