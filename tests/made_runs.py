"""Run folders made by hand, so that reports of them need no training."""

import json
import math

import torch
import yaml
from safetensors.torch import save_file

from gsm_sgd import magnitude_masks, prunable_parameters
from gsm_sgd.experiments import models
from gsm_sgd.experiments.recipes import by_method, find_recipe
from gsm_sgd.masks import sparsity_rows

TOP1 = {"base": 98.41, "gsm_before_cut": 98.07, "gsm_after_cut": 98.06, "pruned": 98.35}
TICKETS = {"ticket_gsm": 97.93, "ticket_magnitude": 96.91}


def make_run(path, name="lenet300", seed=0, preset="fast", command="lottery", epochs=5, top1=None, **fields):
    """Write the folder of a finished run of a recipe, with some fields set, and return its path and result."""
    method = fields.get("method", "gsm")
    recipe = {**by_method(find_recipe(name, preset), method).as_dict(), "seed": seed, **fields}
    recipe["base"]["epochs"] = recipe["gsm"]["epochs"] = epochs
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    process = {"command": f"gsm {command} {name}", "commit": "0123456789ab", "torch": "2.9", "processor": "a processor"}
    (path / "environment.json").write_text(json.dumps({"processes": [process]}))
    lottery = command == "lottery"
    has_base = lottery or recipe["start"] == "base"
    stages = [*(["base"] if has_base else []), method, *(["ticket-gsm", "ticket-magnitude"] if lottery else [])]
    records = [record(stage, epoch, seed) for stage in stages for epoch in range(1, epochs + 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    net = models.build(recipe["model"], seed)
    save(net.state_dict(), path / "init.safetensors")
    if has_base:
        save({key: tensor * 1.5 for key, tensor in net.state_dict().items()}, path / "base.safetensors")
    prunable = prunable_parameters(net)
    noise = torch.Generator().manual_seed(seed)
    moved = {key: weight.detach() + torch.randn(weight.shape, generator=noise) / 30 for key, weight in prunable.items()}
    kept = {key: mask * moved[key] for key, mask in magnitude_masks(moved, compression=recipe["compression"]).items()}
    save({**net.state_dict(), **moved}, path / f"{method}.safetensors")
    save({**net.state_dict(), **kept}, path / "pruned.safetensors")

    layers = sparsity_rows(kept)
    top1 = {**TOP1, **(TICKETS if lottery else {}), **(top1 or {})}
    if method != "gsm":
        top1 = {key.removeprefix("gsm_"): value for key, value in top1.items()}
    result = {
        **{key: recipe[key] for key in ("recipe", "preset", "compression", "seed")},
        "command": command,
        "prunable": sum(layer.params for layer in layers),
        "nonzeros": sum(layer.nonzeros for layer in layers),
        "epochs": dict.fromkeys(stages, epochs),
        "seconds": dict.fromkeys(stages, 12.5),
        "top1": {key: round(value - 0.03 * seed, 2) for key, value in top1.items() if has_base or key != "base"},
        "layers": [layer._asdict() for layer in layers],
        "paper": {"base": 98.19, "pruned": 98.18, "ticket_gsm": 98.22, "ticket_magnitude": 97.39},
        "version": "0.1.0",
        "torch": "2.9",
        "device": "cpu",
    }
    (path / "result.json").write_text(json.dumps(result, indent=2))
    return path, result


def empty(path, *names):
    """Let a finished run have kept nothing of some layers."""
    result = json.loads((path / "result.json").read_text())
    for layer in result["layers"]:
        layer["nonzeros"] *= layer["name"] not in names
    (path / "result.json").write_text(json.dumps(result))


def save(tensors, path):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def record(stage, epoch, seed):
    """Return what an epoch of a stage might have come to."""
    top1 = 98 - 4 * math.exp(-epoch) - 0.03 * seed
    measured = {"stage": stage, "epoch": epoch, "lr": 0.1, "loss": 1 / epoch, "top1": top1, "seconds": 2.5 * epoch}
    if stage == "gsm":
        cut = {"cut_top1": top1 - 40 / epoch**3, "gap": 0.5**epoch, "passive": 0.1**epoch}
        measured |= {**cut, "entered": 1000 // epoch, "returned": 100 // epoch}
    return measured
