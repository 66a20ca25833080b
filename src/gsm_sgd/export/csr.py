"""Linear layers that compute with the weights that are left, where that is faster."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_DTYPES = (torch.float32, torch.float64)
_TURNS = 9
_SECONDS = 0.01  # a turn takes so long, to be told from the clock's noise
_WARM_UP = 3
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
    value: Tensor
    used: Tensor
    rank: Tensor
    bias: Tensor | None

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
        self.register_buffer("value", weight[row, column])
        self.register_buffer("used", used.int())  # the columns that have any weight,
        self.register_buffer("rank", rank.int())  # and which of them each weight is in
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone()[:, None])

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (..., out_features) of inputs (..., in_features)."""
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
            outputs += self.bias
        return outputs.t() if inputs.ndim == 2 else outputs.t().reshape(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        whole = self.in_features * self.out_features
        return f"{self.in_features}, {self.out_features}, {len(self.value):,} of {whole:,} weights"


def sparse_linear(model: nn.Module, batch: int = 1) -> nn.Module:
    """Swap the linear layers of a pruned net for sparse ones, in place, each where it is measured to be faster.

    Measured here and now, on random inputs, with torch's present number of threads. Outputs stay the same to 1e-5 of
    their size. The net is then for inference: sparse layers have no parameters.

    Args:
        model: a net on the CPU; its children are swapped, so that a net that is one linear layer stays as it is.
        batch: how many inputs it will be given at a time.

    Returns:
        The same net.
    """
    for parent, name, layer in linear_layers(model):
        if layer.weight.dtype in _DTYPES:
            inputs = torch.randn(batch, layer.in_features, dtype=layer.weight.dtype)
            sparse = CsrLinear(layer)
            dense_seconds, sparse_seconds = seconds_of([layer, sparse], inputs)
            if sparse_seconds < dense_seconds:
                setattr(parent, name, sparse)
    return model


def linear_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield each linear layer of a net, as the module that it is a child of, its name there, and itself.

    Not those of torch's Transformer layers, whose forward reads the weights without calling the layers.
    """
    for parent in list(model.modules()):
        if isinstance(parent, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            continue
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                yield parent, name, layer


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
