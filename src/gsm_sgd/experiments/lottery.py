"""Winning tickets (Ding et al., section 4.4): which finds the better subnet of an initialisation, GSM or magnitude?"""

from ..masks import Masks, magnitude_masks
from ..names import prunable_parameters
from . import models
from .loop import evaluate
from .prune import Job, finish, initial_net, plain_sgd, prune_steps, train_base, train_stage
from .rundir import Record

TICKETS = {"gsm": "masks", "magnitude": "masks-magnitude"}
"""The masks of each method's ticket."""


def lottery(job: Job) -> Record:
    """Find and retrain a ticket by either method from one initialisation and base net; return the run's result."""
    # 1. Initialise and save. 2. Train the base net. And GSM's part of step 3, which may do without a base net.
    top1 = {} if job.recipe.start == "base" else {"base": train_base(job, initial_net(job))}
    pruned, figures, _ = prune_steps(job)
    top1 |= figures
    for method in TICKETS:
        top1[f"ticket_{method}"] = retrain_ticket(job, method, find_ticket(job, method))
    return finish(job, "lottery", pruned, top1)


def find_ticket(job: Job, method: str) -> Masks:
    """Return the masks of the ticket that a method finds."""
    # 3. Find Q weights: those that GSM has kept, or the largest of the base net.
    model = models.build(job.recipe.model, job.recipe.seed, job.data.classes).to(job.device)
    prunable = prunable_parameters(model)
    if not job.run.has_weights(TICKETS[method]):
        job.run.load_weights("base", model)
        job.run.save_masks(TICKETS[method], magnitude_masks(prunable, compression=job.recipe.compression))
    return job.run.load_masks(TICKETS[method], prunable)


def retrain_ticket(job: Job, method: str, masks: Masks) -> float:
    """Return the accuracy, in percent, to which the weights that the masks keep train from the saved initialisation."""
    recipe, run = job.recipe, job.run
    model = models.build(recipe.model, recipe.seed, job.data.classes).to(job.device)

    # 4. Mask the saved initialisation.
    run.load_weights("init", model)
    masks.apply_(model)

    # 5. Train it with the base settings, masked weights fixed at zero.
    train_stage(job, f"ticket-{method}", model, recipe.base, plain_sgd(model, recipe.base), masks)
    return evaluate(model, job.data.test)
