"""Linear layers that compute with the weights that are left, where that is faster."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

_DTYPES = (torch.float32, torch.float64)
_TURNS = 9
_SECONDS = 0.01  # a turn takes so long, to be told from the clock's noise
_WARM_UP = 3
_TOLERANCE = 1e-5  # of the largest output
_SETTLE = 0.01  # seconds in which the threads of the one before stop spinning in wait of more work


class CsrLinear(nn.Module):
    """A linear layer without its zeros, for inference: y = W x + b with W in compressed sparse rows.

    Row i has the weights `value[start[i]:start[i + 1]]`, in the columns `column[start[i]:start[i + 1]]`.

    Args:
        linear: the dense layer.

    Raises:
        ValueError: its weights are not float32 or float64.
    """

    start: Tensor
    column: Tensor
    used: Tensor
    rank: Tensor
    value: nn.Parameter
    bias: nn.Parameter | None
    dense: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        if weight.dtype not in _DTYPES:
            raise ValueError(f"a sparse linear layer needs float32 or float64 weights, not {weight.dtype}")
        self.out_features, self.in_features = weight.shape
        row, column = weight.nonzero(as_tuple=True)
        ends = torch.bincount(row, minlength=self.out_features).cumsum(0)
        used, rank = column.unique(return_inverse=True)
        self.register_buffer("start", torch.cat([ends.new_zeros(1), ends]).int())
        self.register_buffer("column", column.int())
        self.register_buffer("used", used.int())  # the columns that have any weight,
        self.register_buffer("rank", rank.int())  # and which of them each weight is in
        # Parameters, since nets look at their first one for their device and type.
        self.value = nn.Parameter(weight[row, column], requires_grad=False)
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)
        self.register_parameter("dense", None)

    @property
    def weight(self) -> nn.Parameter:
        """The dense weight: once it is read, for somebody may compute with it or change it, the layer is dense too."""
        if self.dense is None:
            with torch.inference_mode(False), torch.no_grad():
                weight = self.value.new_zeros(self.out_features, self.in_features)
                rows = torch.arange(self.out_features, device=weight.device)
                weight[rows.repeat_interleave(self.start.diff()), self.column] = self.value
            self.dense = nn.Parameter(weight, requires_grad=False)
        return self.dense

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (..., out_features) of inputs (..., in_features)."""
        device = inputs.device.type
        if self.dense is not None or (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return F.linear(inputs, self.weight, self.bias)
        features = inputs.reshape(-1, self.in_features).t()
        # Here features come first, so that each weight is applied to all inputs at once: what one such layer returns is
        # in that order for the next one. Of what comes otherwise only the features that matter are put into it.
        column = self.column
        if not features.is_contiguous():
            features, column = features.index_select(0, self.used), self.rank
        # Torch's sum of weighted rows, made for embeddings, is the product; it beats its products of sparse matrices.
        outputs = F.embedding_bag(
            column, features, self.start, mode="sum", per_sample_weights=self.value, include_last_offset=True
        )
        if self.bias is not None:
            outputs += self.bias[:, None]
        return outputs.t() if inputs.ndim == 2 else outputs.t().reshape(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        whole = self.in_features * self.out_features
        return f"{self.in_features}, {self.out_features}, {len(self.value):,} of {whole:,} weights"


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
        sparse = as_sparse(layer)
        inputs = torch.randn(int(batch), layer.in_features, dtype=layer.weight.dtype, generator=generator)
        dense = partial(F.linear, weight=layer.weight, bias=layer.bias)  # not the layer: global hooks are not for this
        with torch.inference_mode():
            same = _same(dense(inputs), sparse.forward(inputs))
        dense_seconds, sparse_seconds = seconds_of([dense, sparse.forward], inputs)
        if same and sparse_seconds < dense_seconds:
            setattr(parent, name, sparse)
    return model


def as_sparse(layer: nn.Linear) -> CsrLinear:
    """Return a sparse layer that stands in for a dense one."""
    sparse = CsrLinear(layer).train(layer.training)
    vars(sparse).update(_added(layer))
    return sparse


def linear_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield each linear layer that can be swapped, as the module that it is a child of, its name there, and itself.

    That is each plain `nn.Linear` in float32 or float64 on the CPU whose weight is nowhere else in the net; none with
    hooks, parametrizations, a forward of its own or more tensors; and none of torch's Transformer layers, whose forward
    reads the weights without calling the layers. While there are hooks for all modules it is none at all.
    """
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    uses = Counter(_memory(tensor) for _, tensor in tensors)
    for parent in list(model.modules()):
        if isinstance(parent, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) or _has_any_global_hook():
            continue
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and _is_plain(layer) and uses[_memory(layer.weight)] == 1:
                yield parent, name, layer


def _is_plain(layer: nn.Linear) -> bool:
    """Return whether a layer is as `nn.Linear` makes it on the CPU, but for added attributes that are mere facts."""
    tensors = [tensor for tensor in layer._parameters.values() if tensor is not None]
    added = _added(layer)
    return (
        layer._parameters.keys() == {"weight", "bias"}
        and not (layer._buffers or layer._modules)
        and not any(hooks for name, hooks in vars(layer).items() if name.endswith("_hooks"))
        and all(isinstance(fact, bool | int | float | str | None) for fact in added.values())
        and added.keys().isdisjoint([*CsrLinear.__annotations__, "weight"])
        and all(_is_dense(tensor) and tensor.device.type == "cpu" for tensor in tensors)
        and all(tensor.dtype == layer.weight.dtype for tensor in tensors)
        and layer.weight.dtype in _DTYPES
        and layer.weight.numel() > 0
    )


def _added(layer: nn.Linear) -> dict[str, Any]:
    """Return the attributes that something has added to a layer."""
    own = vars(nn.Linear(1, 1, device="meta"))
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
