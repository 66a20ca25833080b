import pytest
import torch
from reference_gsm import NaiveGSM
from torch import nn
from torch.nn import functional as F

from gsm_sgd import GSM


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(32, 12, generator=generator), torch.randint(4, (32,), generator=generator)


def backward(model, batch):
    model.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("passive_decay", [None, 1e-9, 0.05])
@pytest.mark.parametrize("compression", [1, 1.5, 7, 300])
def test_naive_twin_in_lockstep(compression, passive_decay, nesterov):
    fast, slow = small_net().double(), small_net().double()
    settings = {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": nesterov, "passive_decay": passive_decay}
    ours = GSM(fast.parameters(), 0.1, compression=compression, **settings)
    twin = NaiveGSM(slow.parameters(), 0.1, compression, **settings)
    for images, labels in batches(40):
        for model, optimizer in ((fast, ours), (slow, twin)):
            backward(model, (images.double(), labels))
            optimizer.step()
        for p, q in zip(fast.parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
