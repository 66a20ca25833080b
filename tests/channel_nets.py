"""Nets of whose channels some are removed, each with an example of its inputs."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from gsm_sgd.experiments import models
from gsm_sgd.structured.surgery import difference, narrowed, silenced


class Net(nn.Module):
    """Modules by name, and a function of them and the inputs."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self._forward = forward

    def forward(self, *inputs):
        return self._forward(self, *inputs)


def plain(between=lambda net, y: y, channels=8, read=None, **modules):
    """A convolution with norm, something in between, a convolution and a classifier."""

    def forward(net, x):
        y = between(net, F.relu(net.n(net.a(x))))
        return net.h(F.relu(net.b(y)).mean((2, 3)))

    return Net(
        forward,
        **{
            "a": nn.Conv2d(3, channels, 3, padding=1),
            "n": nn.BatchNorm2d(channels),
            "b": nn.Conv2d(read or channels, 6, 3),
            "h": nn.Linear(6, 3),
            **modules,
        },
    )


def images(channels=3, size=8, batch=2):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    """x + conv(relu(norm(conv(x)))), with a norm at the end or not."""

    def __init__(self, channels, norm=True, bias=True, inner=None, layer=nn.Conv2d):
        super().__init__()
        inner = inner or channels
        self.conv1, self.bn1 = layer(channels, inner, 3, padding=1, bias=bias), nn.BatchNorm2d(inner)
        self.conv2 = layer(inner, channels, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(channels) if norm else nn.Identity()

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def residual_net(seed=0, blocks=2, **options):
    torch.manual_seed(seed)
    first = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(*first, *(Residual(8, **options) for _ in range(blocks)), *last)


def unet():
    def forward(net, x):
        a = F.relu(net.an(net.a(x)))
        up = net.u(F.relu(net.bn(net.b(a))))
        return net.h(F.relu(net.c(torch.cat([a, up], 1))))

    return Net(
        forward,
        a=nn.Conv2d(3, 8, 3, padding=1),
        an=nn.BatchNorm2d(8),
        b=nn.Conv2d(8, 16, 3, 2, 1),
        bn=nn.BatchNorm2d(16),
        u=nn.ConvTranspose2d(16, 8, 2, 2),
        c=nn.Conv2d(16, 8, 3, padding=1),
        h=nn.Conv2d(8, 2, 1),
    )


def squeeze_excite(net, y):
    return y * torch.sigmoid(net.up(F.relu(net.down(F.adaptive_avg_pool2d(y, 1)))))


def spatial_attention(net, y):
    """As in CBAM: the mean and the maximum over channels, which therefore stay."""
    both = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
    return y * torch.sigmoid(net.gate(both))


def layer_scale(net, y):
    return y + net.gamma * F.relu(net.n2(net.c(y)))


def scaled_net():
    net = plain(layer_scale, c=nn.Conv2d(8, 8, 3, padding=1), n2=nn.BatchNorm2d(8))
    net.gamma = nn.Parameter(torch.randn(8, 1, 1))
    return net


def tied_net():
    net = plain(lambda net, y: F.relu(net.c(F.relu(net.d(y)))), c=nn.Conv2d(8, 8, 3, padding=1), d=nn.Conv2d(8, 8, 1))
    net.d = nn.Conv2d(8, 8, 3, padding=1)
    net.d.weight = net.c.weight
    return net


def shared_twice():
    """One norm under two names."""
    net = plain(lambda net, y: F.relu(net.m(net.c(y))), c=nn.Conv2d(8, 8, 1))
    net.m = net.n
    return net


def buffered_net():
    net = plain(lambda net, y: net.k * y)
    net.register_buffer("k", torch.randn(1, 8, 1, 1), persistent=False)
    return net


def multiplied():
    """A depthwise convolution with two outputs an input, and a grouped one."""
    return plain(
        lambda net, y: F.relu(net.n3(net.g(F.relu(net.n2(net.d(y)))))),
        read=12,
        d=nn.Conv2d(8, 16, 3, groups=8),
        n2=nn.BatchNorm2d(16),
        g=nn.Conv2d(16, 12, 1, groups=4),
        n3=nn.BatchNorm2d(12),
    )


def one_dimensional():
    return Net(
        lambda net, x: net.h(F.gelu(net.b(F.relu(net.n(net.a(x))))).mean(-1)),
        a=nn.Conv1d(3, 8, 3),
        n=nn.BatchNorm1d(8),
        b=nn.ConvTranspose1d(8, 6, 3, groups=2),
        h=nn.Linear(6, 3),
    )


def three_dimensional():
    return Net(
        lambda net, x: net.h(F.max_pool3d(F.relu(net.b(F.relu(net.n(net.a(x))))), 2).mean((2, 3, 4))),
        a=nn.Conv3d(2, 8, 3),
        n=nn.BatchNorm3d(8),
        b=nn.ConvTranspose3d(8, 6, 3),
        h=nn.Linear(6, 3),
    )


def encoder():
    return Net(
        lambda net, x: net.h(net.e(x).mean(1)),
        e=nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        h=nn.Linear(16, 5),
    )


def mixer():
    """A residual of linear layers along the last axis."""
    return Net(
        lambda net, x: net.h((lambda y: y + net.d(F.relu(net.c(y))))(F.relu(net.a(x))).mean(1)),
        a=nn.Linear(5, 8),
        c=nn.Linear(8, 6),
        d=nn.Linear(6, 8, bias=False),
        h=nn.Linear(8, 3),
    )


def max_of_pixels(net, y):
    return y * y.flatten(2).max(2)[0][:, :, None, None] * F.normalize(y, dim=3)


SMALL = {
    "unet": (unet, images(size=16)),
    "1d": (one_dimensional, torch.randn(2, 3, 20)),
    "3d": (three_dimensional, torch.randn(2, 2, 6, 6, 6)),
    "group norm": (lambda: plain(n=nn.GroupNorm(4, 8)), images()),
    "instance norm": (lambda: plain(n=nn.InstanceNorm2d(8, affine=True)), images()),
    "prelu": (lambda: plain(lambda net, y: net.q(net.p(net.n(y))), p=nn.PReLU(8), q=nn.PReLU()), images()),
    "pixel shuffle": (lambda: plain(lambda net, y: net.p(y), read=2, p=nn.PixelShuffle(2)), images()),
    "pixel unshuffle": (lambda: plain(lambda net, y: net.p(y), read=32, p=nn.PixelUnshuffle(2)), images()),
    "squeeze-excite": (lambda: plain(squeeze_excite, down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1)), images()),
    "spatial attention": (lambda: plain(spatial_attention, gate=nn.Conv2d(2, 1, 3, padding=1)), images()),
    "gate": (lambda: plain(lambda net, y: y * torch.sigmoid(net.g(y)), g=nn.Conv2d(8, 1, 1)), images()),
    "chunks": (lambda: plain(lambda net, y: torch.mul(*y.chunk(2, 1)), read=4), images()),
    "repeat": (lambda: plain(lambda net, y: y.repeat(1, 2, 1, 1), read=16), images()),
    "cat with itself": (lambda: plain(lambda net, y: torch.cat([y, -y], 1), read=16), images()),
    "flat": (
        lambda: Net(
            lambda net, x: net.h(F.relu(net.l(F.relu(net.n(net.a(x))).flatten(1)))),
            a=nn.Conv2d(3, 8, 3),
            n=nn.BatchNorm2d(8),
            l=nn.Linear(8 * 36, 6),
            h=nn.Linear(6, 3),
        ),
        images(),
    ),
    "layer scale": (scaled_net, images()),
    "tied": (tied_net, images()),
    "shared module": (lambda: plain(lambda net, y: F.relu(net.c(F.relu(net.c(y)))), c=nn.Conv2d(8, 8, 1)), images()),
    "shared under two names": (shared_twice, images()),
    "buffer": (buffered_net, images()),
    "depthwise and grouped": (multiplied, images()),
    "residual": (residual_net, images()),
    "residual without norm": (lambda: residual_net(norm=False, bias=False), images()),
    "mask": (lambda: plain(lambda net, y: torch.where(y > 0.1, y, 0.1 * y)), images()),
    "reductions": (lambda: plain(max_of_pixels), images()),
    "flipped pixels": (lambda: plain(lambda net, y: y.flip(-1).roll(1, 2)), images()),
    "upsampled": (lambda: plain(lambda net, y: F.interpolate(y, scale_factor=2, mode="bilinear")), images()),
    "in place": (lambda: plain(lambda net, y: y.mul_(2).add_(net.c(y)), c=nn.Conv2d(8, 8, 1)), images()),
    "encoder": (encoder, torch.randn(2, 7, 16)),
    "linear residual": (mixer, torch.randn(2, 7, 5)),
    "lenet300": (lambda: models.build("lenet300", 0), torch.randn(2, 1, 28, 28)),
    "lenet5": (lambda: models.build("lenet5", 0), torch.randn(2, 1, 28, 28)),
    "resnet20": (lambda: models.build("resnet20", 0), images(size=16)),
    "resnet20a": (lambda: models.build("resnet20a", 0), images(size=16)),
}
"""Nets of all kinds that are traced in an instant."""


def small(name):
    """Return a net of `SMALL` and its inputs."""
    torch.manual_seed(0)
    build, example = SMALL[name]
    return build(), example


@torch.no_grad()
def shaken(model, seed=0):
    """Return a copy of a model with other numbers in all tensors, so that nothing is zero or one by chance."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            tensor.copy_(
                noise.abs() + 0.5
                if name.endswith("running_var")
                else tensor + noise * (0.3 / max(tensor.numel(), 2) ** 0.25)
            )
    return model


def check_sliced(model, groups, inputs, seeds=range(3)):
    """Assert that a model without random units computes what it computes with those at zero, and that it differs."""
    inputs, mattered = inputs if isinstance(inputs, tuple) else (inputs,), []
    for seed in seeds:
        kept = random_kept(groups, seed)
        other = shaken(model, seed)
        quiet, slim = silenced(other, groups.channels, kept), narrowed(other, groups.channels, kept)
        assert difference(quiet, slim, inputs) < 1e-5
        mattered.append(difference(other, slim, inputs))
        assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in other.parameters())
    assert max(mattered) > 1e-3


def random_kept(groups, seed, share=0.5):
    """Return random units, not all, and those that must stay."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(groups.channels.count, generator=generator) < share
    least = groups._select(torch.rand(groups.channels.count, generator=generator).double(), 0)
    kept[(~least).nonzero()[0]] = False
    return kept | least
