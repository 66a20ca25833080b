"""How a budget is divided among layers, and masks that obey it."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from ..masks import Masks, largest
from ..scores import seed_of
from ..selection.stored import select_top

Layers = Literal["global", "erk", "uniform"]
"""Who competes with whom: all weights of the model, or those of a layer, by one of two divisions."""

Division = Literal["erk", "uniform"]


def divide(shapes: Mapping[str, Sequence[int]], num_kept: int, division: Division) -> dict[str, int]:
    """Return how many weights each layer keeps, `num_kept` in all.

    "uniform" gives every layer the same density. "erk", Erdos-Renyi kernel (Evci et al., 2020), gives it a density in
    proportion to the sum of its dimensions over their product, so that small layers stay denser; layers for which that
    would be more than all are kept dense. What is left by rounding down goes to the layers that have lost most by it.

    Raises:
        ValueError: a layer would keep nothing.
    """
    sizes = {key: torch.Size(shape).numel() for key, shape in shapes.items()}
    parts = {key: sum(shapes[key]) if division == "erk" else size for key, size in sizes.items()}
    dense: set[str] = set()
    while True:
        left = num_kept - sum(sizes[key] for key in dense)
        unit = Fraction(left, sum(part for key, part in parts.items() if key not in dense))
        full = {key for key, part in parts.items() if key not in dense and unit * part > sizes[key]}
        if not full:
            break
        dense |= full
    exact = {key: Fraction(sizes[key]) if key in dense else unit * part for key, part in parts.items()}
    kept = {key: int(share) for key, share in exact.items()}
    by_loss = sorted(kept, key=lambda key: kept[key] - exact[key])
    for key in by_loss[: num_kept - sum(kept.values())]:
        kept[key] += 1
    if empty := [key for key, count in kept.items() if not count]:
        raise ValueError(
            f"{division} densities leave {empty[0]!r} none of {num_kept} weights: keep more, or divide otherwise"
        )
    return kept


def top_by_layer(scores: Mapping[str, Tensor], kept: Mapping[str, int]) -> Masks:
    """Return masks of the highest scores of each layer, ties to the lower index."""
    return Masks({key: select_top([score], kept[key])[0] for key, score in scores.items()})


def by_magnitude(weights: Mapping[str, Tensor], num_kept: int, layers: Layers) -> Masks:
    """Return masks of the largest |w|, of the whole model or of each layer.

    Raises:
        ValueError: a weight is NaN, or a layer would keep nothing of its own.
    """
    if layers == "global":
        return largest(weights, num_kept)
    kept = divide({key: weight.shape for key, weight in weights.items()}, num_kept, layers)
    return top_by_layer({key: weight.detach().abs() for key, weight in weights.items()}, kept)


def random_scores(weights: Mapping[str, Tensor], seed: int, step: int = 0) -> dict[str, Tensor]:
    """Return numbers drawn from [0, 1) that depend on seed, step and the layer's name alone, not on the device."""
    drawn = {}
    for key, weight in weights.items():
        generator = torch.Generator().manual_seed(seed_of(key, (seed, step)))
        drawn[key] = torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(weight.device, torch.float32)
    return drawn


def check_layers(value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless `layers` is one of the choices."""
    if value not in choices:
        raise ValueError(f"layers must be {' or '.join(choices)}, not {value!r}")
