"""Latency: how long a net takes on this machine, by measured times of its layers at several widths."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .cost import Grid, Interpolated, Side
from .graph import STAYS, Channels, Layer
from .surgery import narrowed, refit, sliced

_SHARES = (0.25, 0.5, 0.75, 1.0)  # of its channels: the widths at which a layer is measured, besides the least
_SECONDS = 0.02  # that a measurement takes at least


def nanoseconds(module: nn.Module, *inputs: Any) -> int:
    """Return how long a call takes: the median of several, after some to warm up, with torch's number of threads."""
    from torch.utils.benchmark import Timer  # says that there is no CUDA when it is imported

    timer = Timer("module(*inputs)", globals={"module": module, "inputs": inputs}, num_threads=torch.get_num_threads())
    with torch.inference_mode():
        return round(timer.blocked_autorange(min_run_time=_SECONDS).median * 1e9)


class Call(NamedTuple):
    """A call of a layer: what it reads, without data, and how many numbers it gives for each output channel."""

    read: Tensor
    sites: float


def measured(
    model: nn.Module,
    channels: Channels,
    families: Tensor,
    side: Callable[[Tensor], Side],
    inputs: tuple[Any, ...],
    times: MutableMapping[str, int],
) -> Interpolated:
    """Return the latency of a net in evaluation, in nanoseconds, as a cost.

    1. Run the net once, to see what each layer reads.
    2. Measure each layer at several numbers of inputs and outputs; layers that are alike, once.
    3. Measure the net, and once more with every second channel: what its layers do not account for is so much for
       each call of a layer, and so much for each number that layers give.

    Args:
        model: what was traced.
        channels: its channels.
        families: of each unit the number of its family.
        side: returns how many of some units stay, and how many each family has.
        inputs: the model's positional arguments; times are of this batch, in its layout.
        times: nanoseconds by what was measured; what is in there is not measured again, what is not is added.

    Raises:
        ValueError: a layer with channels is not one of torch's convolutions or linear layers.
    """
    kept = torch.zeros(len(families), dtype=torch.bool)
    for family in range(int(families.max()) + 1):
        kept[(families == family).nonzero()[::2]] = True
    half = narrowed(model, channels, kept)
    with _evaluating(model, half):
        seen = _calls(model, channels, inputs)
        wholes = [_time_of_net(times, net, inputs) for net in (model, half)]
    calls = [(layer, seen[_path(layer)].pop(0)) for layer in channels.layers if seen[_path(layer)]]
    grids = [_grid(layer, model.get_submodule(_path(layer)), call.read, side, times) for layer, call in calls]

    widths = [families.bincount(), families[kept].bincount()]
    rests = [max(0.0, whole - Interpolated(grids).total(width)) for whole, width in zip(wholes, widths, strict=True)]
    sites = [call.sites for _, call in calls]
    numbers = [
        sum(
            places * (grid.outputs[0] + float(grid.outputs[1].double() @ width.double()))
            for places, grid in zip(sites, grids, strict=True)
        )
        for width in widths
    ]
    each = max(0.0, rests[0] - rests[1]) / max(1.0, numbers[0] - numbers[1])
    each = min(each, rests[0] / numbers[0])
    grids = [_with_rest(grid, each * places) for grid, places in zip(grids, sites, strict=True)]
    return Interpolated(grids, (rests[0] - each * numbers[0]) / len(grids))


def _path(layer: Layer) -> str:
    return layer.weight.rpartition(".")[0]


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode for a while."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _calls(model: nn.Module, channels: Channels, inputs: tuple[Any, ...]) -> dict[str, list[Call]]:
    """Return the calls of each layer in evaluation, in order, by the layer's path."""
    calls: dict[str, list[Call]] = defaultdict(list)
    handles = []

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            read = torch.empty_like(args[0], device="meta")
            calls[path].append(Call(read, output.numel() / output.shape[_axis(module)]))

        return hook

    for path in dict.fromkeys(map(_path, channels.layers)):
        module = model.get_submodule(path)
        units = [units for layer in channels.layers if _path(layer) == path for units in _sides(layer)]
        if isinstance(module, _ConvNd | nn.Linear):
            handles.append(module.register_forward_hook(note(path)))
        elif any((part != STAYS).any() for part in units):
            raise ValueError(f"{path} is no convolution or linear layer of torch's, so its latency cannot be measured")
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _sides(layer: Layer) -> list[Tensor]:
    return [layer.outputs] if layer.inputs is None else [layer.inputs, layer.outputs]


def _grid(
    layer: Layer, module: nn.Module, read: Tensor, side: Callable[[Tensor], Side], times: MutableMapping[str, int]
) -> Grid:
    """Return the times of a layer at several widths."""
    outputs, given = side(layer.outputs), _widths(layer.outputs, getattr(module, "groups", 1))
    if layer.inputs is None:  # the inputs go with the outputs
        ratio = read.shape[_axis(module)] / len(layer.outputs)
        row = [_time_at(times, module, read, round(width * ratio), width) for width in given]
        return Grid((1, torch.zeros_like(outputs[1])), outputs, ([1], given), [row])
    taken = _widths(layer.inputs)
    costs = [[_time_at(times, module, read, width, of) for of in given] for width in taken]
    return Grid(side(layer.inputs), outputs, (taken, given), costs)


def _with_rest(grid: Grid, each: float) -> Grid:
    """Return a grid with so much more for each output."""
    more = [[cost + each * width for cost, width in zip(row, grid.widths[1], strict=True)] for row in grid.costs]
    return grid._replace(costs=more)


def _widths(units: Tensor, groups: int = 1) -> list[int]:
    """Return rising widths of a layer: the least above zero, some between, and all."""
    free, size = units[units != STAYS], len(units)
    if not len(free):
        return [size]
    stay, step = size - len(free), max(size // groups if groups > 1 else 1, len(free) // len(free.unique()))
    between = {min(size, stay + max(1, round(share * len(free) / step)) * step) for share in _SHARES}
    return sorted({stay or step, *between, size})


def _time_at(times: MutableMapping[str, int], module: Any, read: Tensor, inputs: int, outputs: int) -> int:
    """Return the time of a layer with so many inputs and outputs."""
    small, axis = _narrowed(module, inputs, outputs), _axis(module)
    shape = [inputs if place == axis % read.ndim else size for place, size in enumerate(read.shape)]
    form = torch.channels_last if _is_channels_last(read) else torch.contiguous_format
    given = torch.rand(shape, dtype=read.dtype, device=module.weight.device)
    return _time(times, str(small), small, given.contiguous(memory_format=form))


def _axis(module: Any) -> int:
    """Return the axis along which a layer reads channels."""
    return 1 - module.weight.ndim if isinstance(module, _ConvNd) else -1


def _narrowed(module: Any, inputs: int, outputs: int) -> Any:
    """Return a copy of a layer with its first inputs and outputs."""
    small = copy.deepcopy(module)
    transposed = isinstance(module, _ConvTransposeNd)
    sizes = (inputs, outputs) if transposed else (outputs, inputs)
    dims = {dim: torch.arange(size) for dim, size in enumerate(sizes[: 1 if getattr(module, "groups", 1) > 1 else 2])}
    new = {id(small.weight): sliced(small.weight, dims)}
    if small.bias is not None:
        new[id(small.bias)] = sliced(small.bias, {0: torch.arange(outputs)})
    refit(small, new)
    return small


def _time(times: MutableMapping[str, int], name: str, module: nn.Module, *inputs: Any) -> int:
    """Return the time of a call, which is measured if it has not been."""
    key = f"{name} on {', '.join(map(_described, inputs))}"
    if key not in times:
        times[key] = nanoseconds(module, *inputs)
    return times[key]


def _time_of_net(times: MutableMapping[str, int], net: nn.Module, inputs: tuple[Any, ...]) -> int:
    return _time(times, f"{type(net).__name__} of {sum(p.numel() for p in net.parameters())} parameters", net, *inputs)


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    layout = " channels-last" if _is_channels_last(value) else ""
    return f"{'x'.join(map(str, value.shape))} {value.dtype} {value.device.type}{layout}"


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
