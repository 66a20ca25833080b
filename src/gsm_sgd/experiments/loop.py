"""Training and evaluation of any network by any optimizer; nothing here knows of pruning."""

import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..methods import Method
from ..optim.checks import CutWarning
from ..structured.methods import ChannelMethod
from . import ranks
from .recipes import Precision, Recipe, Training
from .rundir import Record, Stage
from .splits import Dataset, Split

_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # torch's names of such instructions, of x86 and of Arm


class TrainingDivergedError(ArithmeticError):
    """The loss is no longer a number."""


class Probe(Protocol):
    """Something more to measure at each evaluation, with a state of its own."""

    def measure(self, top1: float, steps_left: int) -> Record:
        """Return what the epoch's record is to hold beside its accuracy `top1`."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that later measurements depend on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""


class Observer(Protocol):
    """Somebody who watches a run."""

    def start(self, stage: str, epochs: int, steps_per_epoch: int, epoch: int, step: int) -> None:
        """Tell that a stage begins, or goes on in an epoch after some of its steps, both counted from 0."""

    def step(self) -> None:
        """Tell that an optimizer step has been taken."""

    def epoch(self, record: Record) -> None:
        """Tell what an epoch came to: the record that metrics.jsonl gets."""


_Parts = dict[str, nn.Module | Optimizer | LambdaLR | Probe | Method | ChannelMethod]  # what has a state_dict


def train(
    model: nn.Module,
    optimizer: Optimizer,
    training: Training,
    recipe: Recipe,
    data: Dataset,
    stage: Stage,
    observer: Observer,
    probe: Probe | None = None,
    method: Method | ChannelMethod | None = None,
) -> None:
    """Train `model` for `training.epochs`, from where the stage was interrupted if it was.

    The order of the images is a function of seed and epoch alone, so a state is complete with the model, the
    optimizer, the schedule and the position; on a CPU a resumed stage ends in the bits of an uninterrupted one.

    Raises:
        TrainingDivergedError: the loss of an epoch is not finite.
    """
    device = next(model.parameters()).device
    bfloat16 = fitting_precision(recipe.precision, device) == "bfloat16"
    steps = steps_per_epoch(data, recipe)
    restart = None if method is None else method.restart
    schedule = LambdaLR(optimizer, lr_factor(training, steps, restart or 0))
    parts: _Parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    parts |= {name: part for name, part in (("probe", probe), ("method", method)) if part is not None}
    torch.manual_seed(recipe.seed)
    loss_sum = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    first_epoch, first_step, seconds = _resumed(stage, parts, loss_sum, device)

    net = ranks.replicate(model)
    began = time.perf_counter() - seconds

    def save(epoch: int, step: int) -> None:
        position = {"epoch": epoch, "step": step, "seconds": time.perf_counter() - began}
        stage.save({**_snapshot(parts, device), "loss_sum": loss_sum, **position})

    observer.start(stage.name, training.epochs, steps, first_epoch, first_step)
    for epoch in range(first_epoch, training.epochs):
        model.train()
        batches = data.train.shuffled(recipe.batch_size, recipe.seed, epoch, first_step)
        for step, (images, labels) in enumerate(batches, first_step):
            if stage.due():
                save(epoch, step)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                loss = F.cross_entropy(net(images), labels, label_smoothing=training.label_smoothing)
            whole = min(recipe.batch_size, len(data.train) - step * recipe.batch_size)
            if (weight := ranks.loss_weight(whole)) != 1:
                loss = loss * weight
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.detach() * whole / ranks.world_size()
            observer.step()
        first_step = 0
        if stage.due():  # measuring takes a while too
            save(epoch, steps)

        mean_loss = ranks.all_reduce_sum(loss_sum).item() / len(data.train)
        loss_sum.zero_()
        if not math.isfinite(mean_loss):
            raise TrainingDivergedError(f"the loss of stage {stage.name} is {mean_loss} in epoch {epoch + 1}")
        record = {
            "stage": stage.name,
            "epoch": epoch + 1,
            "lr": optimizer.param_groups[0]["lr"],
            "loss": mean_loss,
            "top1": evaluate(model, data.test),
            "seconds": round(time.perf_counter() - began, 3),
        }
        if probe is not None:
            record |= probe.measure(record["top1"], (training.epochs - epoch - 1) * steps)
        stage.log(record)
        observer.epoch(record)


def fitting_precision(precision: Precision, device: torch.device) -> Precision:
    """Return what "auto" stands for on a device: bfloat16 where it has instructions for it, else float32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fits = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # younger than the oldest torch that we support
        capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        fits = device.type == "cpu" and any(capabilities.get(name) for name in _BFLOAT16)
    return "bfloat16" if fits else "float32"


def steps_per_epoch(data: Dataset, recipe: Recipe) -> int:
    """Return the number of batches that the training set makes."""
    return math.ceil(len(data.train) / recipe.batch_size)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> float:
    """Return top-1 accuracy in percent over a whole split, of which each process looks at its share."""
    ranks.broadcast_buffers(model)
    was_training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
    for images, labels in split.batches(split.evaluation_batch):
        correct += (model(images).argmax(1) == labels).sum()
    model.train(was_training)
    return 100 * ranks.all_reduce_sum(correct).item() / len(split)


def parameter_groups(model: nn.Module, training: Training) -> list[dict[str, Any]]:
    """Return a model's named parameters as two groups: weights, which decay, and biases and norms, which do not."""
    weights = [(name, p) for name, p in model.named_parameters() if p.ndim >= 2]
    others = [(name, p) for name, p in model.named_parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": training.weight_decay}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0, "lr": training.lr * training.bias_lr_factor})
    return groups


def lr_factor(training: Training, steps_per_epoch: float, restart: int = 0) -> Callable[[int], float]:
    """Return what to multiply the initial learning rate by, as a function of the step.

    A linear rise from 0 over the warm-up, then a tenth at each milestone, then the fall along a cosine. With a step of
    `restart` all of that is squeezed into the steps before it, and once more into those from it on.
    """
    total = round(training.epochs * steps_per_epoch)
    if 0 < restart < total:
        first = lr_factor(training, restart / training.epochs)
        second = lr_factor(training, (total - restart) / training.epochs)
        return lambda step: first(step) if step < restart else second(step - restart)
    warmup_steps = round(training.warmup_epochs * steps_per_epoch)
    steps = training.epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        passed = sum(step >= milestone * steps_per_epoch for milestone in training.milestones)
        cosine = 1.0
        if training.cosine is not None and step > training.cosine * steps:
            done = (step / steps - training.cosine) / (1 - training.cosine)
            cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, done))
        return float(0.1**passed * cosine)

    return factor


def _snapshot(parts: _Parts, device: torch.device) -> dict[str, Any]:
    """Return the states of model, optimizer and schedule, and of the generators that dropout, say, draws from."""
    random = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CutWarning)  # a stage is cut after its last checkpoint
        return {**{name: part.state_dict() for name, part in parts.items()}, "random": random}


def _resumed(stage: Stage, parts: _Parts, loss_sum: Tensor, device: torch.device) -> tuple[int, int, float]:
    """Set everything to the state that a stage was last saved in, and return its epoch, step, and seconds so far."""
    if (state := stage.resume(device)) is None:
        return 0, 0, 0.0
    try:
        _restore(state, parts, device)
        loss_sum.copy_(state["loss_sum"])  # the first process's share: of several, the epoch's loss is an estimate
        return int(state["epoch"]), int(state["step"]), float(state["seconds"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise stage.damaged() from error


def _restore(state: dict[str, Any], parts: _Parts, device: torch.device) -> None:
    """Set everything to what `_snapshot` returned."""
    for name, part in parts.items():
        part.load_state_dict(state[name])
    random = state["random"]
    torch.set_rng_state(random["cpu"].cpu())
    if "cuda" in random and device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"].cpu(), device)
