"""Winning tickets (Ding et al., section 4.4): which finds the better subnet of an initialisation, GSM or magnitude?"""

from collections.abc import Mapping

from torch import Tensor

from ..masks import apply_masks_, magnitude_masks, prunable_parameters
from . import models
from .loop import evaluate
from .prune import Job, finish, initial_net, plain_sgd, prune_steps, train_base, train_stage
from .rundir import Record

TRAINED = {"gsm": "gsm", "magnitude": "base"}
"""The net whose largest weights are a method's ticket."""


def lottery(job: Job) -> Record:
    """Find and retrain a ticket by either method from one initialisation and base net; return the run's result."""
    # 1. Initialise and save. 2. Train the base net. And GSM's part of step 3, which may do without a base net.
    top1 = {} if job.recipe.start == "base" else {"base": train_base(job, initial_net(job))}
    pruned, figures = prune_steps(job)
    top1 |= figures
    for method in TRAINED:
        top1[f"ticket_{method}"] = retrain_ticket(job, method, find_ticket(job, method))
    return finish(job, "lottery", pruned, top1)


def find_ticket(job: Job, method: str) -> dict[str, Tensor]:
    """Return the masks of the ticket that a method finds."""
    # 3. Find Q weights: the largest of the trained net.
    model = models.build(job.recipe.model, job.recipe.seed, job.data.classes).to(job.device)
    job.run.load_weights(TRAINED[method], model)
    return magnitude_masks(prunable_parameters(model), job.recipe.compression)


def retrain_ticket(job: Job, method: str, masks: Mapping[str, Tensor]) -> float:
    """Return the accuracy, in percent, to which the weights that the masks keep train from the saved initialisation."""
    recipe, run = job.recipe, job.run
    model = models.build(recipe.model, recipe.seed, job.data.classes).to(job.device)

    # 4. Mask the saved initialisation.
    run.load_weights("init", model)
    masks = {name: mask.to(job.device) for name, mask in masks.items()}
    apply_masks_(prunable_parameters(model), masks)

    # 5. Train it with the base settings, masked weights fixed at zero.
    train_stage(job, f"ticket-{method}", model, recipe.base, plain_sgd(model, recipe.base), masks)
    return evaluate(model, job.data.test)
