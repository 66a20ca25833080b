"""The options of the command `gsm`: its subcommands, their parsers, and the fields of a recipe as options."""

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from . import __version__
from .experiments import UsageError, bench, data, suggestion
from .experiments.lottery import TICKETS
from .experiments.models import check_named
from .experiments.reading import cause, read_yaml
from .experiments.recipes import RECIPES, Preset, Recipe, Training, check_stages, find_recipe
from .export.run import Format
from .export.sparse import Values

_RUNS = {
    "prune": "train, train with GSM, cut; accuracy before and after",
    "lottery": "winning tickets found by GSM and by magnitude, retrained from one initialisation",
}
_TYPES = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "text",
    "tuple": "a list like [40, 80]",
    "NoneType": "null",
}
"""What jsonargparse's errors expect, in words."""
_OPTIONS = {
    "total_steps": "the steps of --gsm.epochs",
    "ramp_steps": "the steps of --ramp",
    "fade_steps": "the steps of --fade",
    "cut_step": "the step of --cut",
    "momentum": "--gsm.momentum",
    "weight_decay": "--gsm.weight_decay",
    "passive_decay": "--passive_decay",
    "shrink_to": "--shrink_to",
}
"""The options that the optimizer's arguments come from."""


def parse(argv: Sequence[str]) -> Namespace:
    """Return the options of the subcommand, with its name as `command`; without any, show the help.

    The defaults of the recipe's fields are those of the recipe and preset named, so these are looked up first.

    Raises:
        UsageError: they are not those of a command.
    """
    try:
        return _parsed(argv or ["--help"])
    except argparse.ArgumentError as error:
        raise UsageError(_plainly(str(error), argv)) from error


def in_options(text: str) -> str:
    """Return what the optimizer says of its arguments in terms of the command's options."""
    return re.sub(rf"\b({'|'.join(_OPTIONS)})\b", lambda found: _OPTIONS[found[0]], text)


def _plainly(error: str, argv: Sequence[str]) -> str:
    """Return what is wrong in the words of a user, who knows none of the parser's types and keys."""
    error = " ".join(error.split()).rstrip(".")
    wrong = re.fullmatch(r'Parser key "(\S+)": .*(?:Got|Given) value: (.*)', error)
    kinds = re.findall(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", error)
    if wrong and kinds:
        key, value = wrong.groups()
        expected = [choices.replace(", ", " or ").replace("'", "") or _TYPES.get(kind, kind) for kind, choices in kinds]
        hint = suggestion(value, re.findall(r"'(\w+)'", " ".join(choices for _, choices in kinds)), otherwise="")
        return f"{key} takes {' or '.join(expected)}, not {value!r}{hint and f': {hint}'}"
    if choice := re.search(r"argument (\w+): invalid choice: '(.*)' \(choose from (.*)\)", error):
        what, word, choices = choice.groups()
        return f"unknown {what} {word!r}: {suggestion(word, re.findall('[a-z]+', choices))}"
    command = "" if not argv or argv[0].startswith("-") else f"{argv[0]} "
    if "required:" in error:
        error = re.sub(r"(\w+\.)+", "", error)  # the names of the commands that the arguments are of
    error = re.sub(r'Parser key "(\S+)"', r"\1", error)
    return error if error.endswith("?") else f"{error}; gsm {command}--help shows what there is"


def _parsed(argv: Sequence[str]) -> Namespace:
    """Return what `parse` does, but raise argparse's errors."""
    names = {field.name for field in fields(Recipe)}
    names |= {f"{stage}.{field.name}" for stage in ("base", "gsm") for field in fields(Training)}
    words = [_underscored(word, names) for word in argv]
    recipe = find_recipe("lenet300")
    if words and words[0] in _RUNS:
        words = [words[0], *_config_first(words[1:])]
        _check_configs(words)
        asked = [word for word in words if not word.startswith(("-h", "--help", "--print_config"))]
        try:
            first = _parser(recipe).parse_args(asked)[words[0]]
        except argparse.ArgumentError:
            pass  # the parser below says what is wrong, or gives the help that was asked for
        else:
            recipe = find_recipe(first.recipe, first.preset)
    options = _parser(recipe).parse_args(words)
    chosen: Namespace = options[options.command]
    chosen.command = options.command
    if chosen.command == "ticket":
        return Namespace(**vars(chosen[chosen.action]), command=f"ticket {chosen.action}")
    given = _given("--compression", words)
    if chosen.get("target_size") is not None and given:
        raise UsageError("--target-size chooses the compression ratio: leave out --compression")
    return chosen


def _config_first(words: list[str]) -> list[str]:
    """Put --config FILE before all else, so that what is given beside it has the last word."""
    for place, word in enumerate(words):
        if word == "--config" and place + 1 < len(words):
            return [*words[place : place + 2], *words[:place], *_config_first(words[place + 2 :])]
        if word.startswith("--config="):
            return [word, *words[:place], *_config_first(words[place + 1 :])]
    return words


def _given(option: str, words: Sequence[str]) -> list[str]:
    """Return the values that an option has on the command line."""
    return [
        (word.partition("=")[2] if "=" in word else following)
        for word, following in pairwise([*words, ""])
        if word.partition("=")[0] == option
    ]


def _check_configs(words: Sequence[str]) -> None:
    """Raise UsageError for a --config that is damaged, or would run code: it may be the recipe of another's run."""
    for path in map(Path, _given("--config", words)):
        try:
            check_stages(theirs := read_yaml(path))
        except FileNotFoundError:
            continue  # the parser says so
        except (OSError, ValueError) as error:
            raise UsageError(f"--config {path} cannot be read: {cause(error)}") from error
        if not _given("--model", words) and "model" in theirs:
            check_named(str(theirs["model"]), path, None)


def _underscored(word: str, names: set[str]) -> str:
    """Let a recipe's fields be written with dashes too: --batch-size is --batch_size."""
    option, equals, value = word.partition("=")
    field = option[2:].replace("-", "_")
    return f"--{field}{equals}{value}" if option.startswith("--") and field in names else word


def _parser(recipe: Recipe) -> ArgumentParser:
    """Return the parser, with the fields of `recipe` as defaults."""
    parser = _Parser(prog="gsm", description="Train a neural network to an exact, chosen sparsity.")
    parser.add_argument("--version", action="version", version=f"gsm-sgd {__version__}")
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("list", _Parser(), help="the recipes, the paper's figures and what the presets cost")
    for name, text in _RUNS.items():
        commands.add_subcommand(name, _run_parser(recipe, name, text), help=text)

    show = _Parser(description="Show runs, finished or not, or the layers of a weight file.")
    show.add_argument("runs", nargs="+", type=Path, help="run folders, or safetensors, sparse, HDF5 or ticket files")
    show.add_argument("--json", type=Path | None, default=None, help="also write runs of several seeds to this file")
    commands.add_subcommand("show", show, help="what runs came to, or the layers of a weight file")

    report = _Parser(description="Write one page with everything about runs, finished or not.")
    report.add_argument("runs", nargs="+", type=Path, help="run folders")
    report.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the page")
    commands.add_subcommand("report", report, help="a page with results, curves, layers, masks and sizes of runs")
    commands.add_subcommand("export", _export_parser(), help="write a finished run's pruned net as a file for others")
    commands.add_subcommand("verify", _verify_parser(), help="check a sparse file against its certificate")
    ticket = _Parser(description="Store a winning ticket in a few KB, and train it again.")
    commands.add_subcommand("ticket", ticket, help="store a winning ticket in a few KB, and train it again")
    _add_ticket_actions(ticket)  # only now: jsonargparse wants the outer ones first

    cost = _Parser(description="Measure what an optimizer step costs, or how long the pruned nets of runs take.")
    cost.add_argument(
        "subject", type=str, help="what to measure: step, GSM's beside SGD's; or inference, dense and sparse"
    )
    of_what = f"step: models of {', '.join(bench.WORKLOADS)} (default: lenet300 resnet56); inference: run folders"
    cost.add_argument("names", nargs="*", help=of_what)
    cost.add_argument("--repeats", type=int, default=9, help="turns of steps")
    cost.add_argument("--device", type=str, default="auto", help="of steps: auto, cpu, cuda, ...")
    _add_model(cost)
    commands.add_subcommand("bench", cost, help="what an optimizer step costs, or a pruned net's inference")

    fetch = _Parser(description="Fetch a data set and verify it.")
    fetch.add_argument("dataset", type=str, help=f"which one: {', '.join(data.FETCHED)}")
    _add_data_dir(fetch)
    commands.add_subcommand("data", fetch, help="fetch a data set and verify it")
    return parser


def _export_parser() -> ArgumentParser:
    parser = _Parser(description="Write a finished run's pruned net as a file for others.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--format", type=Format, default="sparse", help="sparse: small, with a certificate")
    parser.add_argument("--out", type=Path | None, default=None, help="the file; default pruned.<ending> in the folder")
    parser.add_argument(
        "--values", type=Values, default="float32", help="what to round the weights of a sparse file to"
    )
    _add_data_dir(parser)  # rounded weights have their accuracy measured
    _add_model(parser)
    return parser


def _verify_parser() -> ArgumentParser:
    parser = _Parser(description="Compute all that a sparse file's certificate states from its weights, and compare.")
    parser.add_argument("file", type=Path, help="what gsm export --format sparse has written")
    parser.add_argument("--accuracy", action="store_true", help="measure the accuracy too, which needs the data")
    _add_data_dir(parser)
    _add_model(parser)
    return parser


def _add_ticket_actions(parser: ArgumentParser) -> None:
    actions = parser.add_subcommands(dest="action")
    save = _Parser(description="Store a ticket of a finished lottery: seed, mask, recipe and accuracy.")
    save.add_argument("run", type=Path, help="the lottery's folder")
    save.add_argument("--method", type=Literal[*TICKETS], default="gsm", help="what found it")
    save.add_argument("-o", "--out", type=Path | None, default=None, help="the file; default in the run's folder")
    actions.add_subcommand("save", save, help="store a ticket of a finished lottery")
    replay = _Parser(description="Initialise a ticket's net from its seed, train it again, and compare.")
    replay.add_argument("file", type=Path, help="what gsm ticket save has written")
    replay.add_argument("--out", type=Path, default=Path("runs"), help="folder that gets the run's folder")
    _add_data_dir(replay)
    _add_model(replay)
    replay.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, ...")
    replay.add_argument(
        "--threads", type=int | None, default=None, help="CPU threads; default as many as the ticket had"
    )
    actions.add_subcommand("replay", replay, help="train a stored ticket again")


def _run_parser(recipe: Recipe, command: str, description: str) -> ArgumentParser:
    usage = f"gsm {command} RECIPE [options]"
    parser = _Parser(usage=usage, description=f"{description[0].upper()}{description[1:]}.")
    parser.add_argument("recipe", type=str, help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--preset", type=Preset, default="fast", help="whose settings")
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any fields of the recipe")
    parser.add_argument("--seeds", type=str | None, default=None, help="several runs, like 0,1,2")
    parser.add_argument("--epochs-scale", type=float, default=1.0, help="shorten every stage, milestones too")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder that gets the run's folder")
    _add_data_dir(parser)
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--threads", type=int | None, default=None, help="CPU threads")
    parser.add_argument("--checkpoint-seconds", type=float, default=20.0, help="time between checkpoints")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard event files")
    if command == "prune":
        parser.add_argument(
            "--target-size",
            type=str | None,
            default=None,
            help="of a sparse file, like 20KB, which then is exported; in place of --compression",
        )
    parser.add_argument("--debug", action="store_true", help="show where an error arose")
    defaults: dict[str, Any] = recipe.as_dict()
    del defaults["recipe"], defaults["preset"]
    parser.add_class_arguments(Recipe, default=defaults, skip={"recipe", "preset"})
    for action in parser._actions:
        if action.dest.partition(".")[0] in defaults:
            action.required = False  # all have a default here, so the help is not to call them required
    return parser


def _add_model(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=str | None, default=None, help="a file.py:function or module:function that may build the net"
    )


def _add_data_dir(parser: ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path | None, default=None, help="folder of the data; default $GSM_DATA")


class _Parser(ArgumentParser):
    """A parser that raises instead of printing its usage, so that an error is one line; it takes no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(exit_on_error=False, allow_abbrev=False, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong, with the options that are meant if one is misspelt, or lacks its stage."""
        misspelt = re.match(r"unrecognized arguments: --?([^ =]+)", message)
        if misspelt and ex is None:  # else it has been said by the parser of a subcommand
            meant = self._like(misspelt[1])
            message += f"; did you mean {' or '.join(meant)}?" if meant else ""
        super().error(message, ex)

    def _like(self, word: str) -> list[str]:
        """Return the options that have the name nearest to a word, or have it as their last part: --lr is --gsm.lr."""
        options = [option for option in self._option_string_actions if option.startswith("--")]
        names = {option: {option[2:], option[2:].rpartition(".")[2]} for option in options}
        near = difflib.get_close_matches(word, set().union(*names.values()), n=1)
        return [option for option in options if near and near[0] in names[option]]
