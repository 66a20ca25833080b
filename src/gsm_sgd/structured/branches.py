"""Branches beside a shortcut: which may vanish as a whole, and what is of no use without them?"""

from typing import NamedTuple

import torch
from torch import Tensor

from .graph import STAYS, Channels


class Branch(NamedTuple):
    """The units that a layer reads, which may all go at once, and all units that are of no use without them."""

    units: Tensor
    useless: Tensor


def find_branches(channels: Channels) -> list[Branch]:
    """Return the branches that may all vanish, as a way from the inputs to the outputs is left without them."""
    read = {}
    for layer in channels.layers:
        if layer.inputs is not None and (layer.inputs != STAYS).all():
            units = layer.inputs.unique()
            read[tuple(units.tolist())] = units
    found, gone = [], torch.zeros(channels.count + 1, dtype=torch.bool)
    for units in read.values():
        mine = torch.zeros_like(gone)
        mine[units] = True
        alone = all(mine[other].all() or not mine[other].any() for other in channels.slots.values())
        live = _live(channels, mine) if alone and _live(channels, gone | mine) is not None else None
        if live is not None:
            gone |= mine
            found.append(Branch(units, (~live[:-1]).nonzero().squeeze(1)))
    return found


def _live(channels: Channels, gone: Tensor) -> Tensor | None:
    """Return which units are on a way from the model's inputs to its outputs, or None if an output is cut off."""
    inputs, outputs = channels.ends
    sources = {name: [] if len(units) and gone[units].all() else before for name, before, units in channels.flow}
    reached: set[str] = set()
    for name, before in sources.items():
        if name in inputs or any(source in reached for source in before):
            reached.add(name)
    if not outputs <= reached:
        return None
    needed, waiting = set(outputs), list(outputs)
    while waiting:
        new = [source for source in sources[waiting.pop()] if source in reached and source not in needed]
        needed.update(new)
        waiting.extend(new)
    live = torch.zeros_like(gone)
    for name, _, units in channels.flow:
        if name in needed:
            live[units] = True
    return live & ~gone
