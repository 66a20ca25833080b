"""Pruning without finetuning (Ding et al., sections 3 and 4.1): base -> GSM -> cut -> test before and after.

Or with another method in GSM's place, which is what it is compared with.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import update_bn

from .. import __version__
from ..budget import Budget
from ..masks import Masks, keep_masked, sparsity_table
from ..methods import METHODS, Method
from ..names import prunable_parameters
from ..optim.gsm import GSM
from ..schedules import Schedule
from ..structured import METHODS as OF_CHANNELS
from ..structured.channels import ChannelGroups
from ..structured.compactor import ResRep, compactors, insert_compactors, merge, resrep_parameters
from ..structured.methods import ChannelMethod
from ..structured.remove import remove_channels
from . import UsageError, models
from .channels import costs, find_channels, measure_latency, silencing_parameters, weight_masks
from .cutnow import CutNow
from .environment import device_name
from .loop import Observer, Probe, evaluate, parameter_groups, steps_per_epoch, train
from .pretrained import load_pretrained
from .recipes import OURS, Recipe, Training
from .rundir import Record, RunFolder, read_metrics
from .splits import Dataset

_IMAGENET = 1_000  # classes: a folder of images with another number of them is not ImageNet


@dataclass(frozen=True)
class Job:
    """A recipe, the data it trains on, the folder it leaves its results in, and who watches."""

    recipe: Recipe
    data: Dataset
    run: RunFolder
    observer: Observer
    device: torch.device


def prune(job: Job) -> Record:
    """Train, train with GSM, cut; return the run's result, which its folder has as result.json."""
    model, top1, costs = prune_steps(job)
    return finish(job, "prune", model, top1, costs)


def prune_steps(job: Job) -> tuple[nn.Module, dict[str, float], Record]:
    """Return the pruned net, the accuracies on the way, in percent, and what channels came to, if they were pruned.

    Steps already done are loaded.
    """
    recipe, run, test = job.recipe, job.run, job.data.test
    top1 = {}

    # 1. Initialise and save.
    model = initial_net(job)

    # 2. Train the base net, or take the one given, if GSM is to start from it.
    if recipe.start == "base":
        top1["base"] = train_base(job, model)

    # 3. Train with GSM: all but Q weights shrink to nothing. They may be cut before the end. Or by another method.
    steps = steps_per_epoch(job.data, recipe)
    groups = _channels(job, model) if recipe.pattern == "channel" else None
    if recipe.method != OURS:
        trained, sgd, method = rival(recipe, model, steps, groups)
        train_stage(job, recipe.method, trained, recipe.gsm, sgd, method=method, groups=groups)
        top1["before_cut"] = evaluate(trained, test)
        return _cut(job, merge(trained) if compactors(trained) else model, top1, "after_cut", groups)
    optimizer = gsm(model, recipe, steps, groups)
    train_stage(job, "gsm", model, recipe.gsm, optimizer, probe=CutNow(model, optimizer, recipe, test, steps))
    if recipe.cut_epoch < recipe.gsm.epochs:
        records = {record["epoch"]: record for record in read_metrics(run.path) if record["stage"] == "gsm"}
        at_cut = records.get(recipe.cut_epoch)
        if at_cut is None:
            raise UsageError(
                f"{run.path / 'metrics.jsonl'} lacks epoch {recipe.cut_epoch} of stage gsm: "
                "delete gsm.safetensors beside it to train the stage again"
            )
        top1["gsm_before_cut"], top1["gsm_after_cut"] = at_cut["top1"], at_cut["cut_top1"]
    else:
        top1["gsm_before_cut"] = evaluate(model, test)

    # 4. Cut. The optimizer has the masks, unless the stage was over before this process began.
    if not run.has_weights("masks"):
        _save_masks(run, model, optimizer.would_keep(), groups)
    return _cut(job, model, top1, "gsm_after_cut", groups)


def _channels(job: Job, model: nn.Module) -> ChannelGroups:
    """Return the channels of a net, and UsageError if their latency cannot be as low as the recipe wants it."""
    groups = find_channels(model, next(iter(job.data.test.batches(1)))[0])
    if job.recipe.latency is not None:
        measure_latency(job.run, model, groups)
        latency = groups.for_budget("latency")
        try:
            latency.check_budget(Budget.of(**job.recipe.budget).num_kept(latency.total(list(model.parameters()))))
        except ValueError as error:
            raise UsageError(str(error)) from error
    return groups


def _save_masks(run: RunFolder, model: nn.Module, kept: Masks, groups: ChannelGroups | None) -> None:
    """Save masks of single weights; of channels, what is kept of the parameters that silence them as well."""
    if groups is not None:
        run.save_masks("channels", kept)
    run.save_masks("masks", kept if groups is None else weight_masks(merge(model), groups, kept))


def _cut(
    job: Job, model: nn.Module, top1: dict[str, float], after_cut: str, groups: ChannelGroups | None = None
) -> tuple[nn.Module, dict[str, float], Record]:
    """Cut by the run's masks, measure, save, and return what `prune_steps` does."""
    recipe, run, test = job.recipe, job.run, job.data.test
    left, prunable = sum(layer.nonzeros for layer in sparsity_table(model)), prunable_parameters(model)
    masks = run.load_masks("masks", prunable)
    masks.apply_(prunable)
    if groups is not None:
        silencing = silencing_parameters(model, groups)
        channels = run.load_masks("channels", silencing)
        channels.apply_(silencing)
    pruned = evaluate(model, test)
    top1.setdefault(after_cut, pruned)
    if recipe.recalibrate and left > masks.num_kept:
        update_bn(job.data.train.shuffled(recipe.batch_size, recipe.seed, epoch=0), model)
        pruned = evaluate(model, test)
    top1["pruned"] = pruned
    run.save_weights("pruned", model)
    if groups is None:
        return model, top1, {}
    narrow = remove_channels(model, groups, channels)
    run.save_narrow(narrow)
    return model, top1, costs(groups, channels, narrow)


def initial_net(job: Job) -> nn.Module:
    """Return the net as it is initialised, saved if it was not yet."""
    model = models.build(job.recipe.model, job.recipe.seed, job.data.classes).to(job.device)
    if not job.run.has_weights("init"):
        job.run.save_weights("init", model)
    job.run.load_weights("init", model)
    return model


def train_base(job: Job, model: nn.Module) -> float:
    """Train an initial net by plain SGD, or load the weights given, and return its accuracy in percent."""
    if job.recipe.pretrained is not None and not job.run.has_weights("base"):
        load_pretrained(model, job.recipe.model, job.recipe.pretrained)
        job.run.save_weights("base", model)
    train_stage(job, "base", model, job.recipe.base, plain_sgd(model, job.recipe.base))
    return evaluate(model, job.data.test)


def train_stage(
    job: Job,
    name: str,
    model: nn.Module,
    training: Training,
    optimizer: Optimizer,
    masks: Masks | None = None,
    probe: Probe | None = None,
    method: Method | ChannelMethod | None = None,
    groups: ChannelGroups | None = None,
) -> None:
    """Train `model` as one stage of the run, or load what the stage left if it is over.

    Raises:
        RuntimeError: a weight that `masks` does not keep is not zero in the end.
    """
    stage = job.run.stage(name)
    if not job.run.has_weights(name):
        masks = masks or Masks()
        if masks:
            keep_masked(optimizer, masks)
        train(model, optimizer, training, job.recipe, job.data, stage, job.observer, probe, method)
        if method is not None:  # first: once the stage's weights are there, nobody knows the masks any more
            masks_of_method = method.finalize() if isinstance(method, ChannelMethod) else method.final_masks()
            _save_masks(job.run, model, masks_of_method, groups)
        weights = prunable_parameters(model)
        for key, mask in masks.items():
            if weights[key][~mask].any():
                raise RuntimeError(f"a masked weight of {key} moved in stage {name}")
        job.run.save_weights(name, model)
    job.run.load_weights(name, model)
    stage.discard_checkpoint()


def plain_sgd(model: nn.Module, training: Training) -> SGD:
    """Return the optimizer of base nets and tickets."""
    groups = parameter_groups(model, training)
    return SGD(
        resrep_parameters(model, groups=groups) if compactors(model) else groups,
        lr=training.lr,
        momentum=training.momentum,
        nesterov=training.nesterov,
        fused=next(model.parameters()).device.type in ("cpu", "cuda"),
    )


def gsm(model: nn.Module, recipe: Recipe, steps_per_epoch: int, groups: ChannelGroups | None = None) -> GSM:
    """Return the optimizer of GSM training, of single weights or of channels."""
    cut = recipe.cut_epoch / recipe.gsm.epochs
    total = recipe.gsm.epochs * steps_per_epoch
    return GSM(
        parameter_groups(model, recipe.gsm),
        lr=recipe.gsm.lr,
        **recipe.budget,
        pattern=groups,
        momentum=recipe.gsm.momentum,
        nesterov=recipe.gsm.nesterov,
        schedule=Schedule(total, ramp=recipe.ramp, fade=recipe.fade, cut=cut, shrink_to=recipe.shrink_to),
        passive_decay=recipe.gsm.weight_decay if recipe.passive_decay is None else recipe.passive_decay,
        score=recipe.score,
    )


def rival(
    recipe: Recipe, model: nn.Module, steps_per_epoch: int, groups: ChannelGroups | None = None
) -> tuple[nn.Module, SGD, Method | ChannelMethod]:
    """Return what a method other than GSM trains, a copy with compactors if it is ResRep; its optimizer, and itself."""
    if groups is not None and recipe.method == ResRep.name:
        model = insert_compactors(model, groups)
    sgd = plain_sgd(model, recipe.gsm)
    return model, sgd, method_of(recipe, sgd, steps_per_epoch, model, groups)


def method_of(
    recipe: Recipe,
    optimizer: Optimizer,
    steps_per_epoch: int,
    model: nn.Module | None = None,
    groups: ChannelGroups | None = None,
) -> Method | ChannelMethod:
    """Return the method of a recipe, other than GSM, on an optimizer; of channels, of the model that it trains."""
    total_steps = recipe.gsm.epochs * steps_per_epoch
    if model is not None and groups is not None:
        rival = OF_CHANNELS[recipe.method]
        return rival(optimizer, total_steps, model, groups, **recipe.budget, **recipe.settings)
    method = METHODS[recipe.method]
    seed = {"seed": recipe.seed} if "seed" in method.settings() else {}
    return method(optimizer, total_steps, compression=recipe.compression, **recipe.settings, **seed)


def finish(job: Job, command: str, pruned: nn.Module, top1: dict[str, float], costs: Record | None = None) -> Record:
    """Write and return the result of a run; `costs` become a part of it."""
    recipe = job.recipe
    last: dict[str, Any] = {record["stage"]: record for record in read_metrics(job.run.path)}
    layers = sparsity_table(pruned)
    result: Record = {
        "recipe": recipe.recipe,
        "command": command,
        "preset": recipe.preset,
        "method": recipe.method,
        "compression": recipe.compression,
        "seed": recipe.seed,
        "prunable": sum(layer.params for layer in layers),
        "nonzeros": sum(layer.nonzeros for layer in layers),
        "epochs": {stage: record["epoch"] for stage, record in last.items()},
        "seconds": {stage: record["seconds"] for stage, record in last.items()},
        "top1": top1,
        "layers": [layer._asdict() for layer in layers],
        "paper": recipe.paper() if recipe.dataset != "imagenet" or job.data.classes == _IMAGENET else None,
        "version": __version__,
        "torch": torch.__version__,
        "device": device_name(job.device),
    }
    result |= costs or {}
    job.run.finish(result)
    return result
