"""Method: which weights are active when, on any torch optimizer. A subclass is a pruning method."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, dataclass_transform

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..budget import Budget
from ..distributed import is_dtensor
from ..masks import Cut, Masks, largest
from ..names import prunable_in
from ..optim.sparse import SparseOptimizer
from ..schedules import real_number, whole_number


@dataclass_transform(eq_default=False, kw_only_default=True, field_specifiers=(field,))
class _Settings:
    """Makes a dataclass of each subclass, so that its annotated attributes are arguments."""

    def __init_subclass__(cls) -> None:
        dataclass(eq=False, repr=False, kw_only=True)(cls)


class Method(_Settings):
    """A way to train to exactly Q weights by any torch optimizer; each subclass is one.

    It works inside `optimizer.step()`, so the training loop stays as it is: weights that are not in the masks are zero
    after every step, and so are their gradients in it. Where the masks change, the optimizer's tensors for weights that
    are cut, such as momentum, become zero, and so weights that come back begin with zeros. Build the method once the
    weights that training starts from are in place, as some choose masks at once, and call `finalize()` in the end.

    A method of your own defines `name` and one or more of `start`, `before_step` and `after_step`. Annotated attributes
    with defaults are its settings, and arguments of its constructor.

    Args:
        optimizer: what trains the net, of any of torch's kinds. Parameters with `ndim >= 2` are pruned, or those of
            groups that have `prunable=True`; with `model.named_parameters()` masks have the parameters' names.
        total_steps: optimizer steps of the whole training.
        compression, density, sparsity, num_kept: the budget, one of them, as of `GSM`. `num_kept` is then Q.

    Attributes:
        weights: the prunable parameters by name, or position.
        step: how many steps have been taken.

    Raises:
        ValueError: an argument is out of range, nothing is prunable, or what is cannot be handled.

    Example:
        >>> optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
        >>> method = Gradual(optimizer, total_steps, compression=60)
        >>> for images, labels in batches:
        ...     optimizer.zero_grad()
        ...     F.cross_entropy(model(images), labels).backward()
        ...     optimizer.step()
        >>> masks = method.finalize()
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""  # in words, if those are others

    optimizer: Optimizer = field(kw_only=False)
    total_steps: int = field(kw_only=False)
    compression: float | None = None
    density: float | None = None
    sparsity: float | None = None
    num_kept: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments, choose the first masks, and follow the optimizer's steps."""
        self.total_steps = whole_number("total_steps", self.total_steps)
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, not {self.total_steps}")
        if isinstance(self.optimizer, SparseOptimizer):
            raise ValueError(f"{type(self.optimizer).__name__} prunes by itself: give {self.name} a torch optimizer")
        self.weights = {key: p for key, p in prunable_in(self.optimizer).items() if p.requires_grad}
        for key, weight in self.weights.items():
            if is_dtensor(weight) or weight.is_complex():
                raise ValueError(f"{key!r} is complex, or sharded over processes, which {self.name} does not take")
        if not self.weights:
            raise ValueError("nothing to prune: give a parameter with ndim >= 2, or a prunable group")
        budget = Budget.of(self.compression, self.density, self.sparsity, self.num_kept)
        self.num_kept = budget.num_kept(self.num_prunable)
        self.check()
        self.step, self._is_final = 0, False
        self._cut = {key: Cut(torch.zeros_like(weight, dtype=torch.bool)) for key, weight in self.weights.items()}
        self._change(self.start())
        self.optimizer.register_step_pre_hook(self._before)
        self.optimizer.register_step_post_hook(self._after)

    # --- what a subclass defines ---

    def check(self) -> None:
        """Raise ValueError if a setting is out of range; nothing has changed."""

    def start(self) -> Mapping[str, Tensor] | None:
        """Return the masks to begin with; None keeps all weights."""

    def before_step(self) -> Mapping[str, Tensor] | None:
        """Return the masks from now on, None for those there are; gradients of all weights are in place."""

    def after_step(self) -> Mapping[str, Tensor] | None:
        """Return the masks from now on, None for those there are; `step` counts the step that was just taken."""

    def final(self) -> Mapping[str, Tensor]:
        """Return masks of Q weights where training ends before there are any: by default the largest |w|."""
        return largest(self.weights, self.kept)

    @property
    def restart(self) -> int | None:
        """The step at which a learning rate schedule should start again, if any."""
        return None

    # --- what it has ---

    @property
    def num_prunable(self) -> int:
        """N, the number of prunable weights."""
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def kept(self) -> int:
        """Q, the number of weights that are kept in the end."""
        assert self.num_kept is not None
        return self.num_kept

    @property
    def masks(self) -> Masks:
        """Which weights are active now."""
        return Masks({key: ~cut.mask for key, cut in self._cut.items()})

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Return the settings of this method alone, with their defaults."""
        shared = {field.name for field in fields(Method)}
        own = fields(cls)
        return {field.name: field.default for field in own if field.name not in shared}

    @torch.no_grad()
    def finalize(self) -> Masks:
        """Cut what is not cut yet, so that exactly Q weights are kept, for good; steps taken later train these alone.

        Returns:
            The masks.

        Raises:
            ValueError: a weight is NaN, so nothing can be kept by magnitude.
        """
        self._change(self.final_masks())
        self._is_final = True
        self._zero_weights()
        return self.masks

    def final_masks(self) -> Masks:
        """Return the masks that `finalize()` would return now; nothing changes."""
        masks = self.masks
        return masks if self._is_final or masks.num_kept == self.kept else Masks(self.final())

    def skip_step(self) -> None:
        """Let the optimizer do nothing in the step that is due: the gradients are those of another net."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Return all that the steps to come depend on but weights and the optimizer's state, as tensors and numbers."""
        return {**self._identity(), "step": self.step, "is_final": self._is_final, "masks": dict(self.masks)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; weights and the optimizer's state are to be loaded as well, before or after.

        Raises:
            ValueError: it is of another method, has other settings, or masks that do not fit.
        """
        for key, ours in self._identity().items():
            if state[key] != ours:
                raise ValueError(f"the state was saved with {key} {state[key]}, which is {ours} here")
        masks = state["masks"]
        shapes = {key: mask.shape for key, mask in masks.items()}
        if shapes != {key: weight.shape for key, weight in self.weights.items()}:
            raise ValueError("the state's masks are of other parameters")
        self.step, self._is_final = state["step"], state["is_final"]
        self._cut = {key: Cut(~masks[key].to(weight.device, torch.bool)) for key, weight in self.weights.items()}

    def _identity(self) -> dict[str, Any]:
        settings = {key: getattr(self, key) for key in self.settings()}
        return {"method": self.name, **settings, "total_steps": self.total_steps, "num_kept": self.kept}

    # --- steps ---

    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Prepare a step before it, or where a closure computes the gradients in it, after that."""
        optimizer, *given = args
        closure = given[0] if given else kwargs.get("closure")
        if closure is None:
            self._prepare()
            return None

        def prepared() -> Any:
            loss = closure()
            self._prepare()
            return loss

        return (optimizer, prepared), {}

    @torch.no_grad()
    def _prepare(self) -> None:
        if not self._is_final:
            self._change(self.before_step())
        for key, weight in self.weights.items():
            self._cut[key].zero_gradient_(weight)

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        self.step += 1
        self._zero_weights()
        if not self._is_final:
            self._change(self.after_step())

    @torch.no_grad()
    def _change(self, masks: Mapping[str, Tensor] | None) -> None:
        """Let other weights be active."""
        if masks is None:
            return
        for key, weight in self.weights.items():
            self._cut[key] = cut = Cut(~masks[key])
            for value in self.optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    cut.zero_(value)
        self._zero_weights()

    def _zero_weights(self) -> None:
        for key, weight in self.weights.items():
            self._cut[key].zero_(weight)


def check_share(key: str, value: Any, low: float = 0.0) -> float:
    """Return a share of the training as a number.

    Raises:
        ValueError: it is not from `low` to 1.
    """
    share = real_number(key, value)
    if not low <= share <= 1:
        raise ValueError(f"{key} is a share, from {low:g} to 1, not {share:g}")
    return share


def check_every(value: Any) -> int:
    """Return how many steps lie between two changes of the masks.

    Raises:
        ValueError: it is no whole number above 0.
    """
    every = whole_number("every", value)
    if every < 1:
        raise ValueError(f"every must be at least 1, not {every}")
    return every
