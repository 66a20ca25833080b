"""The commands that make or take one file: `gsm export`, `eval`, `verify` and `ticket`."""

from jsonargparse import Namespace

from ..experiments.observers import ProgressBars
from ..experiments.prune import Job
from ..experiments.recipes import net_name
from ..experiments.rundir import RunFolder
from ..experiments.states import tensors_hash
from ..export.evaluation import evaluate_source
from ..export.rebuild import load_data, recipe_of, verify_accuracy
from ..export.run import export
from ..export.sparse import read_sparse
from ..export.ticket import check_fits, read_ticket, replay, save_ticket
from ..masks import sparsity_rows
from ..names import is_prunable
from .console import Console, find_device, set_threads, trusted
from .runs import already
from .show import print_layers


def export_run(options: Namespace, console: Console) -> None:
    """Write a run's pruned net to a file and say how large it is."""
    where = (options.out, options["values"], options.data_dir, trusted(options))
    console.say(export(options.run, options.format, *where))


def evaluate_file(options: Namespace, console: Console) -> None:
    """Measure the accuracy of a run or a file and say it."""
    found = evaluate_source(options.source, options.recipe, options.data_dir, trusted(options))
    console.say(f"{options.source}: {found}")


def save(options: Namespace, console: Console) -> None:
    """Store a ticket and say where."""
    console.say(save_ticket(options.run, options.method, options.out))


def verify(options: Namespace, console: Console) -> None:
    """Check a sparse file and say what is true of it."""
    file = read_sparse(options.file)
    certificate = file.certificate
    counts = f"{certificate.nonzeros:,} of {certificate.prunable:,} weights, each layer's, and sha256"
    text = f"verified: {counts} {certificate.sha256}"
    if options.accuracy:
        text += f"; accuracy measured again: {verify_accuracy(options.file, file, options.data_dir, trusted(options))}"
    elif certificate.top1 is not None:
        text += f"; accuracy stated: {certificate.top1:.2f} %, --accuracy measures it"
    others = [name for name in file.tensors if name not in file.prunable and is_prunable(file.tensors[name])]
    if others:
        text += f"; not counted, as it is stored as unpruned: {', '.join(others)}"
    print_layers(sparsity_rows(file.pruned), options.file, console)
    console.say(text)


def replay_ticket(options: Namespace, console: Console, log: Console) -> None:
    """Train a stored ticket again and say whether the result is the same."""
    ticket = read_ticket(options.file)
    recipe = recipe_of(ticket.recipe, options.file, trusted(options))
    device = find_device(options.device)
    threads = ticket.threads if options.threads is None else options.threads
    set_threads(threads)
    dataset = load_data(recipe, options.data_dir).to(device)
    check_fits(ticket, recipe, dataset.classes, options.file)
    which = tensors_hash(ticket.masks)[:12]  # another ticket of the same recipe and seed is another run
    net, of_run = net_name(recipe.recipe, recipe.model), f"x{recipe.compression:g}-s{recipe.seed}"
    name = f"{net}-replay-{ticket.method}-{recipe.preset}-{of_run}-{which}"
    with RunFolder(options.out / name, recipe) as folder:
        log.say(f"{folder.path}{already(folder)}")
        if not folder.finished:
            folder.note_environment(device)
        with ProgressBars(log) as bars:
            again = replay(Job(recipe, dataset, folder, bars, device), ticket, options.file)
    if again.same_weights and again.top1 == ticket.top1:
        console.say(f"identical: {again.top1:.2f} %, and the same weights to the bit")
        return
    same = "the same accuracy" if again.top1 == ticket.top1 else "not identical"
    console.say(
        f"{same}: {again.top1:.2f} % here, {ticket.top1:.2f} % there, with other weights; the bits are those of one "
        f"machine and number of threads, there {ticket.threads} ({ticket.machine}), here {threads}"
    )
