"""The command `gsm bench`: what a step costs on the shapes of a model, and how long the nets of runs take."""

import logging
from pathlib import Path

from jsonargparse import Namespace

from ..experiments import UsageError, suggestion
from ..experiments.bench import measure, steps_in_all, workload
from ..export.inference import MEASUREMENTS, latency_table, measure_inference, verdict
from ..reports.tables import costs_table
from .console import Console, find_device, trusted


def bench(options: Namespace, console: Console, log: Console) -> None:
    """Measure what was asked for, each thing in turn."""
    match options.subject:
        case "step":
            _steps(options, console, log)
        case "inference":
            _inference(options, console, log)
        case subject:
            raise UsageError(f"unknown benchmark {subject!r}: {suggestion(subject, ('step', 'inference'))}")


def _steps(options: Namespace, console: Console, log: Console) -> None:
    if options.repeats < 1:
        raise UsageError(f"repeats must be at least 1, not {options.repeats}")
    device = find_device(options.device)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no CUDA is no news
    works = {name: workload(name) for name in options.names or ("lenet300", "resnet56")}
    for name, work in works.items():
        with log.progress(name, steps_in_all(options.repeats)) as progress:
            costs = measure(work, options.repeats, device, progress)
        console.print(costs_table(name, work, costs))
        log.warn_if_busy(costs)


def _inference(options: Namespace, console: Console, log: Console) -> None:
    if not options.names:
        raise UsageError("name the folders of the runs to measure: gsm bench inference RUN...")
    for folder in map(Path, options.names):
        with log.progress(str(folder), MEASUREMENTS) as progress:
            latencies = measure_inference(folder, trusted(options), progress)
        console.print(latency_table(str(folder), latencies))
        console.say(verdict(latencies))
        log.warn_if_busy(latencies)
