"""Linear layers and 1x1 convolutions that compute with the weights that are left, where that is faster."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

_Layer = TypeVar("_Layer", bound=nn.Module)
_DTYPES = (torch.float32, torch.float64)
_BLOCKS = (32, 16, 8, 4)  # sizes of square blocks that are looked for
_FILLED = 1.1  # how many numbers blocks may hold for each weight that is not zero
_TURNS = 9
_SECONDS = 0.01  # a turn takes so long, to be told from the clock's noise
_WARM_UP = 3
_TOLERANCE = 1e-5  # of the largest output
_SETTLE = 0.01  # seconds in which the threads of the one before stop spinning in wait of more work


class SparseLinear(nn.Module):
    """A linear layer without its zeros, for inference; a subclass says how it stores and multiplies its weights.

    Args:
        linear: the dense layer.

    Raises:
        ValueError: its weights are not float32 or float64.
    """

    bias: nn.Parameter | None
    dense: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight
        if weight.dtype not in _DTYPES:
            raise ValueError(f"a sparse linear layer needs float32 or float64 weights, not {weight.dtype}")
        self.out_features, self.in_features = weight.shape
        self._store(weight.detach())
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)
        self.register_parameter("dense", None)

    def _store(self, weight: Tensor) -> None:
        """Keep what the weights are."""
        raise NotImplementedError

    def _whole(self) -> Tensor:
        """Return them as a dense matrix."""
        raise NotImplementedError

    def product(self, features: Tensor) -> Tensor:
        """Return W x of columns x, (in_features, count) to (out_features, count)."""
        raise NotImplementedError

    @property
    def weight(self) -> nn.Parameter:
        """The dense weight: once it is read, for somebody may compute with it or change it, the layer is dense too."""
        if self.dense is None:
            with torch.inference_mode(False), torch.no_grad():
                self.dense = nn.Parameter(self._whole(), requires_grad=False)
        return self.dense

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (..., out_features) of inputs (..., in_features)."""
        device = inputs.device.type
        if self.dense is not None or (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return F.linear(inputs, self.weight, self.bias)
        # Here features come first, so that each weight is applied to all inputs at once: what one such layer returns is
        # in that order for the next one.
        outputs = self.product(inputs.reshape(-1, self.in_features).t())
        if self.bias is not None:
            outputs += self.bias[:, None]
        return outputs.t() if inputs.ndim == 2 else outputs.t().reshape(*inputs.shape[:-1], self.out_features)


class CsrLinear(SparseLinear):
    """A linear layer without its zeros, for inference: y = W x + b with W in compressed sparse rows.

    Row i has the weights `value[start[i]:start[i + 1]]`, in the columns `column[start[i]:start[i + 1]]`.
    """

    start: Tensor
    column: Tensor
    used: Tensor
    rank: Tensor
    value: nn.Parameter

    def _store(self, weight: Tensor) -> None:
        row, column = weight.nonzero(as_tuple=True)
        ends = torch.bincount(row, minlength=self.out_features).cumsum(0)
        used, rank = column.unique(return_inverse=True)
        self.register_buffer("start", torch.cat([ends.new_zeros(1), ends]).int())
        self.register_buffer("column", column.int())
        self.register_buffer("used", used.int())  # the columns that have any weight,
        self.register_buffer("rank", rank.int())  # and which of them each weight is in
        # Parameters, since nets look at their first one for their device and type.
        self.value = nn.Parameter(weight[row, column], requires_grad=False)

    def _whole(self) -> Tensor:
        weight = self.value.new_zeros(self.out_features, self.in_features)
        rows = torch.arange(self.out_features, device=weight.device)
        weight[rows.repeat_interleave(self.start.diff()), self.column] = self.value
        return weight

    def product(self, features: Tensor) -> Tensor:
        """Return W x; of features that do not come first in memory only those that matter are put into that order."""
        column = self.column
        if not features.is_contiguous():
            features, column = features.index_select(0, self.used), self.rank
        # Torch's sum of weighted rows, made for embeddings, is the product; it beats its products of sparse matrices.
        return F.embedding_bag(
            column, features, self.start, mode="sum", per_sample_weights=self.value, include_last_offset=True
        )

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        whole = self.in_features * self.out_features
        return f"{self.in_features}, {self.out_features}, {len(self.value):,} of {whole:,} weights"


class BsrLinear(SparseLinear):
    """A linear layer without its zeros, for inference: y = W x + b with W in square blocks in compressed sparse rows.

    Row i of blocks has the blocks `value[start[i]:start[i + 1]]`, in the columns `column[start[i]:start[i + 1]]` of
    blocks. It multiplies by MKL, which takes square blocks only.

    Args:
        linear: the dense layer, whose sizes `size` divides.
        size: of a block.
    """

    start: Tensor
    column: Tensor
    value: nn.Parameter

    def __init__(self, linear: nn.Linear, size: int) -> None:
        self._size = size
        super().__init__(linear)

    def _store(self, weight: Tensor) -> None:
        blocks = weight.unflatten(1, (-1, self._size)).unflatten(0, (-1, self._size)).transpose(1, 2)
        row, column = blocks.count_nonzero((2, 3)).nonzero(as_tuple=True)
        ends = torch.bincount(row, minlength=len(blocks)).cumsum(0)
        self.register_buffer("start", torch.cat([ends.new_zeros(1), ends]).int())
        self.register_buffer("column", column.int())
        self.value = nn.Parameter(blocks[row, column].contiguous(), requires_grad=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse BSR tensor support is in beta")  # once in a process
            self._matrix()

    def _matrix(self) -> Tensor:
        size = (self.out_features, self.in_features)
        return torch.sparse_bsr_tensor(self.start, self.column, self.value, size, check_invariants=False)

    def _whole(self) -> Tensor:
        return self._matrix().to_dense()

    def product(self, features: Tensor) -> Tensor:
        """Return W x."""
        return torch.mm(self._matrix(), features.contiguous())

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (..., out_features) of inputs (..., in_features); where gradients of these are asked for, densely."""
        if torch.is_grad_enabled() and inputs.requires_grad:
            return F.linear(inputs, self.weight, self.bias)
        return super().forward(inputs)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        whole = self.in_features * self.out_features // self._size**2
        blocks = f"{len(self.value):,} of {whole:,} blocks of {self._size} x {self._size}"
        return f"{self.in_features}, {self.out_features}, {blocks}"


class SparseConv1x1(nn.Module):
    """A convolution of 1 x 1 by a sparse linear layer, which it applies at each place.

    Args:
        conv: the dense convolution, without padding and in one group.
        linear: what it does at a place.
    """

    def __init__(self, conv: nn.Conv2d, linear: SparseLinear) -> None:
        super().__init__()
        self.linear, self.stride = linear, conv.stride

    @property
    def weight(self) -> Tensor:
        """The dense weight; see `SparseLinear.weight`."""
        return self.linear.weight[:, :, None, None]

    @property
    def bias(self) -> Tensor | None:
        """As of the convolution."""
        return self.linear.bias

    def forward(self, images: Tensor) -> Tensor:
        """Return (batch, out_channels, height, width) of images (batch, in_channels, ...)."""
        images = images[..., :: self.stride[0], :: self.stride[1]]
        channels = images.movedim(-3, 0)
        outputs: Tensor = self.linear(channels.flatten(1).t()).t()
        return outputs.unflatten(1, channels.shape[1:]).movedim(0, -3).contiguous()  # type: ignore[no-any-return]


def sparse_layers(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Swap the linear layers and 1x1 convolutions of a pruned net for sparse ones, each where it is measured faster.

    As `sparse_linear`, but each layer is measured on as much as it gets in `model(inputs)`, which is computed once.

    Args:
        model: a net on the CPU; its children are swapped.
        inputs: an example.

    Returns:
        The same net.
    """
    found = list(_plain_layers(model))
    shapes: dict[nn.Module, torch.Size] = {}
    handles = [
        layer.register_forward_pre_hook(lambda layer, given: shapes.setdefault(layer, given[0].shape) and None)
        for *_, layer in found
    ]
    try:
        with torch.inference_mode():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    generator = torch.Generator().manual_seed(0)
    ones: Sequence[nn.Module]
    for parent, name, layer in found:
        if layer not in shapes:
            continue
        example = torch.randn(shapes[layer], dtype=layer.weight.dtype, generator=generator)
        if isinstance(layer, nn.Linear):
            dense, ones = partial(F.linear, weight=layer.weight, bias=layer.bias), _sparse_ones(layer)
        else:
            dense = partial(F.conv2d, weight=layer.weight, bias=layer.bias, stride=layer.stride)
            ones = [_like(layer, SparseConv1x1(layer, one)) for one in _sparse_ones(_at_a_place(layer))]
        quickest = _quickest(dense, ones, example)
        if quickest is not None:
            setattr(parent, name, quickest)
    return model


def _at_a_place(conv: nn.Conv2d) -> nn.Linear:
    """Return what a 1x1 convolution does at each place."""
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, conv.in_channels, conv.out_channels, conv.bias is not None)
    linear.weight = nn.Parameter(conv.weight.detach().flatten(1))
    linear.bias = conv.bias  # type: ignore[assignment]
    return linear


def sparse_linear(model: nn.Module, batch: int = 1) -> nn.Module:
    """Swap the linear layers of a pruned net for sparse ones, in place, each where it is measured to be faster.

    Measured here and now, on random inputs, with torch's present number of threads. Outputs of finite inputs stay the
    same to 1e-5 of their size. The net is then for inference: sparse layers do not train. Layers that others could
    tell from sparse ones stay as they are: see `linear_layers`.

    Args:
        model: a net on the CPU; its children are swapped, so that a net that is one linear layer stays as it is.
        batch: how many inputs it will be given at a time.

    Returns:
        The same net.

    Raises:
        ValueError: batch is below 1.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    generator = torch.Generator().manual_seed(0)
    for parent, name, layer in linear_layers(model):
        inputs = torch.randn(int(batch), layer.in_features, dtype=layer.weight.dtype, generator=generator)
        dense = partial(F.linear, weight=layer.weight, bias=layer.bias)  # not the layer: global hooks are not for this
        quickest = _quickest(dense, _sparse_ones(layer), inputs)
        if quickest is not None:
            setattr(parent, name, quickest)
    return model


def _quickest(dense: Callable[[Tensor], Tensor], candidates: Sequence[nn.Module], inputs: Tensor) -> nn.Module | None:
    """Return the layer that takes least, and less than the dense one, of those that compute the same."""
    with torch.inference_mode():
        expected = dense(inputs)
        same = [layer for layer in candidates if _same(expected, layer.forward(inputs))]
    if not same:
        return None
    dense_seconds, *seconds = seconds_of([dense, *(layer.forward for layer in same)], inputs)
    least = min(seconds)
    return same[seconds.index(least)] if least < dense_seconds else None


def _sparse_ones(layer: nn.Linear) -> list[SparseLinear]:
    """Return the sparse layers that may stand in for a dense one: in rows, and in blocks if its weights lie in any."""
    size = _block_size(layer.weight)
    return [as_sparse(layer), *([] if size is None else [_like(layer, BsrLinear(layer, size))])]


@torch.no_grad()
def _block_size(weight: Tensor) -> int | None:
    """Return the size of the largest square blocks that hold the weights with few zeros, if there is one."""
    if not torch.backends.mkl.is_available():
        return None
    kept = int(weight.count_nonzero())
    for size in _BLOCKS:
        if weight.shape[0] % size == 0 and weight.shape[1] % size == 0:
            blocks = weight.unflatten(1, (-1, size)).unflatten(0, (-1, size))
            if 0 < int(blocks.count_nonzero((1, 3)).count_nonzero()) * size**2 <= _FILLED * kept:
                return size
    return None


def as_sparse(layer: nn.Linear) -> CsrLinear:
    """Return a sparse layer that stands in for a dense one."""
    return _like(layer, CsrLinear(layer))


def _like(layer: nn.Linear | nn.Conv2d, sparse: _Layer) -> _Layer:
    """Give a sparse layer what is known of the dense one."""
    vars(sparse.train(layer.training)).update(_added(layer))
    return sparse


def linear_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield each linear layer that can be swapped, as the module that it is a child of, its name there, and itself.

    That is each plain `nn.Linear` in float32 or float64 on the CPU whose weight is nowhere else in the net; none with
    hooks, parametrizations, a forward of its own or more tensors; and none of torch's Transformer layers, whose forward
    reads the weights without calling the layers. While there are hooks for all modules it is none at all.
    """
    for parent, name, layer in _plain_layers(model):
        if isinstance(layer, nn.Linear):
            yield parent, name, layer


def _plain_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear | nn.Conv2d]]:
    """Yield the linear layers and 1x1 convolutions that can be swapped."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    uses = Counter(_memory(tensor) for _, tensor in tensors)
    for parent in list(model.modules()):
        if isinstance(parent, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) or _has_any_global_hook():
            continue
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear | nn.Conv2d) or type(layer) not in (nn.Linear, nn.Conv2d):
                continue
            if isinstance(layer, nn.Conv2d) and not _is_at_places(layer):
                continue
            if _is_plain(layer) and uses[_memory(layer.weight)] == 1:
                yield parent, name, layer


def _is_at_places(conv: nn.Conv2d) -> bool:
    """Return whether a convolution does the same as a linear layer at each place."""
    return (conv.kernel_size, conv.padding, conv.groups) == ((1, 1), (0, 0), 1)


def _is_plain(layer: nn.Linear | nn.Conv2d) -> bool:
    """Return whether a layer is as torch makes it on the CPU, but for added attributes that are mere facts."""
    tensors = [tensor for tensor in layer._parameters.values() if tensor is not None]
    added = _added(layer)
    return (
        layer._parameters.keys() == {"weight", "bias"}
        and not (layer._buffers or layer._modules)
        and not any(hooks for name, hooks in vars(layer).items() if name.endswith("_hooks"))
        and all(isinstance(fact, bool | int | float | str | None) for fact in added.values())
        and added.keys().isdisjoint(["weight", "linear", *SparseLinear.__annotations__, *CsrLinear.__annotations__])
        and all(_is_dense(tensor) and tensor.device.type == "cpu" for tensor in tensors)
        and all(tensor.dtype == layer.weight.dtype for tensor in tensors)
        and layer.weight.dtype in _DTYPES
        and layer.weight.numel() > 0
    )


def _added(layer: nn.Linear | nn.Conv2d) -> dict[str, Any]:
    """Return the attributes that something has added to a layer."""
    own = vars(nn.Conv2d(1, 1, 1, device="meta") if isinstance(layer, nn.Conv2d) else nn.Linear(1, 1, device="meta"))
    return {name: value for name, value in vars(layer).items() if name not in own}


def _memory(tensor: Tensor) -> int:
    """Return what tensors that share memory have in common."""
    return tensor.untyped_storage().data_ptr() if _is_dense(tensor) else id(tensor)


def _is_dense(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


def _same(dense: Tensor, sparse: Tensor) -> bool:
    """Return whether outputs are the same but for the order in which they were summed."""
    return bool(((sparse - dense).abs() <= _TOLERANCE * dense.abs().max()).all())


@torch.inference_mode()
def seconds_of(functions: list[Callable[[Tensor], object]], inputs: Tensor) -> list[float]:
    """Return the seconds that each function takes for some inputs: the least of several turns, taken by turns.

    Whatever else a machine does can only add to it.
    """
    return [min(seconds) for seconds in turns_of(functions, inputs)]


def turns_of(functions: list[Callable[[Tensor], object]], inputs: Tensor) -> list[list[float]]:
    """Return the seconds that each function takes for some inputs in each of several turns."""
    calls = []
    for function in functions:
        for _ in range(_WARM_UP):
            function(inputs)
        began = time.perf_counter()
        function(inputs)
        calls.append(max(1, round(_SECONDS / (time.perf_counter() - began))))
    turns: list[list[float]] = [[] for _ in functions]
    for _ in range(_TURNS):
        for function, count, seconds in zip(functions, calls, turns, strict=True):
            time.sleep(_SETTLE)
            function(inputs)
            began = time.perf_counter()
            for _ in range(count):
                function(inputs)
            seconds.append((time.perf_counter() - began) / count)
    return turns
