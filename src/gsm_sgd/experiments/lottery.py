"""Winning tickets (Ding et al., section 4.4): which finds the better subnet of an initialisation, GSM or magnitude?"""

from ..masks import apply_masks_, magnitude_masks, prunable_parameters
from . import models
from .loop import evaluate
from .prune import Job, finish, initial_net, plain_sgd, prune_steps, train_base, train_stage
from .rundir import Record


def lottery(job: Job) -> Record:
    """Find and retrain a ticket by either method from one initialisation and base net; return the run's result."""
    # 1. Initialise and save. 2. Train the base net. And GSM's part of step 3, which may do without a base net.
    top1 = {} if job.recipe.start == "base" else {"base": train_base(job, initial_net(job))}
    pruned, figures = prune_steps(job)
    top1 |= figures
    top1["ticket_gsm"] = retrain_ticket(job, "gsm", trained="gsm")
    top1["ticket_magnitude"] = retrain_ticket(job, "magnitude", trained="base")
    return finish(job, "lottery", pruned, top1)


def retrain_ticket(job: Job, method: str, trained: str) -> float:
    """Return the accuracy, in percent, of the ticket that the largest weights of the net `trained` make."""
    recipe, run = job.recipe, job.run
    model = models.build(recipe.model, recipe.seed, job.data.classes).to(job.device)
    prunable = prunable_parameters(model)

    # 3. Find Q weights: the largest of the trained net.
    run.load_weights(trained, model)
    masks = magnitude_masks(prunable, recipe.compression)

    # 4. Mask the saved initialisation.
    run.load_weights("init", model)
    apply_masks_(prunable, masks)

    # 5. Train it with the base settings, masked weights fixed at zero.
    train_stage(job, f"ticket-{method}", model, recipe.base, plain_sgd(model, recipe.base), masks)
    return evaluate(model, job.data.test)
