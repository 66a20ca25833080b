"""The options of the command `gsm`: its subcommands, their parsers, and the fields of a recipe as options."""

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from . import __version__
from .experiments import UsageError, bench, data, suggestion
from .experiments.compare import parse_methods
from .experiments.lottery import TICKETS
from .experiments.models import check_named
from .experiments.reading import cause, read_yaml
from .experiments.recipes import (
    OURS,
    RECIPES,
    RIVALS,
    Preset,
    Recipe,
    Training,
    add_settings,
    by_method,
    check_stages,
    find_recipe,
    find_settings,
)
from .export.run import Format
from .export.sparse import Values
from .methods import METHODS

_RUNS = {
    "prune": "train, train with GSM or another method, cut; accuracy before and after",
    "lottery": "winning tickets found by GSM and by magnitude, retrained from one initialisation",
    "compare": "several methods at several ratios and seeds: table, figure, CSV and report",
}
_COMPARED = "gsm,gradual,rigl,one_shot,dense"
_SHARED: dict[str, tuple[Any, object, str]] = {
    "--data-dir": (Path | None, None, "folder of the data; default $GSM_DATA"),
    "--device": (str, "auto", "auto, cpu, cuda, ..."),
    "--model": (str | None, None, "a file.py:function or module:function that may build the net"),
    "--out": (Path, Path("runs"), "folder that gets the run's folder"),
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
    "momentum": "--gsm.momentum",
    "weight_decay": "--gsm.weight_decay",
    "passive_decay": "--passive_decay",
    "shrink_to": "--shrink_to",
}
"""The options that the optimizer's arguments come from."""


def parse(argv: Sequence[str]) -> Namespace:
    """Return the options of the subcommand, with its name as `command`; without any, show the help.

    The defaults of the recipe's fields are those of the recipe and preset named, so these are looked up first.
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
    recipe, methods = find_recipe("lenet300"), [OURS]
    if words and words[0] in _RUNS:
        words = [words[0], *_config_first(words[1:])]
        methods = _methods(words)  # of a comparison all, and the defaults are GSM's
        asked = [word for word in words if not word.startswith(("-h", "--help", "--print_config"))]
        try:
            first = _parser(recipe, methods).parse_args(asked)[words[0]]
        except argparse.ArgumentError:
            pass  # the parser below says what is wrong, or gives the help that was asked for
        else:
            recipe = find_recipe(first.recipe, first.preset)
    recipe = by_method(recipe, methods[0]) if words[:1] == ["prune"] else recipe
    options = _parser(recipe, methods).parse_args(words)
    chosen: Namespace = options[options.command]
    chosen.command = options.command
    if chosen.command == "ticket":
        return Namespace(**vars(chosen[chosen.action]), command=f"ticket {chosen.action}")
    if chosen.get("target_size") is not None and _is_given("--compression", words):
        raise UsageError("--target-size chooses the compression ratio: leave out --compression")
    return chosen


def _config_first(words: Sequence[str]) -> list[str]:
    """Return the words with --config FILE first, so that the options beside it have the last word.

    Raises:
        UsageError: a file is damaged, or would run code: it may be the recipe of another's run.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path, action="append", default=[])
    given, rest = parser.parse_known_args(words)
    for path in given.config:
        try:
            check_stages(theirs := read_yaml(path))
        except (OSError, ValueError) as error:
            raise UsageError(f"--config {path} cannot be read: {cause(error)}") from error
        if not _is_given("--model", words) and "model" in theirs:
            check_named(str(theirs["model"]), path, None)
    return [*(f"--config={path}" for path in given.config), *rest]


def _methods(words: Sequence[str]) -> list[str]:
    """Return the methods that words, or the files of --config, name; GSM if none is named.

    Raises:
        UsageError: there is no such method.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path, action="append", default=[])
    parser.add_argument("--method", default=None)
    parser.add_argument("--methods", default=_COMPARED)
    given, _ = parser.parse_known_args(words)
    named = given.method
    for path in given.config:
        named = given.method or read_yaml(path).get("method", named)
        if others := [method for method in RIVALS if method in read_yaml(path) and method != named]:
            raise UsageError(f"{path} has settings of {others[0]}: leave out --method {named}")
    find_settings(method := str(named or OURS))
    return parse_methods(given.methods) if words[:1] == ["compare"] and method == OURS else [method]


def _is_given(option: str, words: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == option for word in words)


def _underscored(word: str, names: set[str]) -> str:
    """Let a recipe's fields be written with dashes too: --batch-size is --batch_size."""
    option, equals, value = word.partition("=")
    field = option[2:].replace("-", "_")
    return f"--{field}{equals}{value}" if option.startswith("--") and field in names else word


def _parser(recipe: Recipe, methods: Sequence[str]) -> ArgumentParser:
    """Return the parser, with the fields of `recipe` as defaults and the settings of these methods as options."""
    parser = _Parser(prog="gsm", description="Train a neural network to an exact, chosen sparsity.")
    parser.add_argument("--version", action="version", version=f"gsm-sgd {__version__}")
    commands = parser.add_subcommands(dest="command")

    _command(commands, "list", "the recipes, the paper's figures and what the presets cost")
    for name, text in _RUNS.items():
        parser_of_runs = _command(commands, name, text, usage=f"gsm {name} RECIPE [options]")
        _add_run_options(parser_of_runs, recipe, name)
        for method in methods:
            add_settings(parser_of_runs, method)

    show = _command(commands, "show", "show runs, finished or not, or the layers of a weight file")
    show.add_argument("runs", nargs="+", type=Path, help="run folders, or safetensors, sparse, HDF5 or ticket files")
    _option(show, "--json", Path | None, None, "also write runs of several seeds to this file")

    report = _command(commands, "report", "write a page with results, curves, layers, masks and sizes of runs")
    report.add_argument("runs", nargs="+", type=Path, help="run folders, finished or not")
    report.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the page")

    export = _command(commands, "export", "write a finished run's pruned net as a file for others")
    export.add_argument("run", type=Path, help="the run's folder")
    _option(export, "--format", Format, "sparse", "sparse: small, with a certificate")
    _option(export, "--out", Path | None, None, "the file; default pruned.<ending> in the folder")
    _option(export, "--values", Values, "float32", "what to round the weights of a sparse file to")
    _shared(export, "--data-dir", "--model")  # rounded weights have their accuracy measured

    verify = _command(commands, "verify", "compute all that a sparse file's certificate states, and compare")
    verify.add_argument("file", type=Path, help="what gsm export --format sparse has written")
    verify.add_argument("--accuracy", action="store_true", help="measure the accuracy too, which needs the data")
    _shared(verify, "--data-dir", "--model")

    actions = _command(commands, "ticket", "store a winning ticket in a few KB, and train it again").add_subcommands(
        dest="action"
    )
    save = _command(actions, "save", "store a ticket of a finished lottery: seed, mask, recipe and accuracy")
    save.add_argument("run", type=Path, help="the lottery's folder")
    _option(save, "--method", Literal[*TICKETS], "gsm", "what found it")
    _option(save, "--out", Path | None, None, "the file; default in the run's folder", "-o")
    replay = _command(actions, "replay", "initialise a stored ticket's net from its seed, train it again, and compare")
    replay.add_argument("file", type=Path, help="what gsm ticket save has written")
    _shared(replay, "--out", "--data-dir", "--model", "--device")
    _option(replay, "--threads", int | None, None, "CPU threads; default as many as the ticket had")

    cost = _command(commands, "bench", "measure an optimizer step, or how long the pruned nets of runs take")
    cost.add_argument(
        "subject", type=str, help="what to measure: step, GSM against SGD; or inference, dense and sparse"
    )
    of_what = f"step: models of {', '.join(bench.WORKLOADS)} (default: lenet300 resnet56); inference: run folders"
    cost.add_argument("names", nargs="*", help=of_what)
    _option(cost, "--repeats", int, 9, "interleaved repetitions of each step")
    _shared(cost, "--device", "--model")

    fetch = _command(commands, "data", "fetch a data set and verify it")
    fetch.add_argument("dataset", type=str, help=f"which one: {', '.join(data.FETCHED)}")
    _shared(fetch, "--data-dir")
    return parser


def _add_run_options(parser: ArgumentParser, recipe: Recipe, command: str) -> None:
    parser.add_argument("recipe", type=str, help=f"one of {', '.join(RECIPES)}")
    _option(parser, "--preset", Preset, "fast", "whose settings")
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any fields of the recipe")
    _option(parser, "--seeds", str | None, None, "several runs, like 0,1,2 or 0-4")
    _option(parser, "--epochs-scale", float, 1.0, "shorten every stage, milestones too")
    _shared(parser, "--out", "--data-dir", "--device")
    _option(parser, "--threads", int | None, None, "CPU threads")
    _option(parser, "--checkpoint-seconds", float, 20.0, "time between checkpoints")
    if command != "compare":
        _option(parser, "--name", str | None, None, "of the run's folder, before ratio and seed")
        parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard event files")
    several = "C; of N prunable weights floor(N / C) are kept; or several runs, like 20,60,200"
    _option(parser, "--compression", float | str, recipe.compression, several)
    if command == "prune":
        _option(parser, "--method", str, recipe.method, f"what prunes: {', '.join((OURS, *RIVALS))}")
        parser.add_argument("--baseline", action="store_true", help="also train the dense net, for as many epochs")
        what = "of a sparse file, like 20KB, which then is exported; in place of --compression"
        _option(parser, "--target-size", str | None, None, what)
    elif command == "compare":
        _option(parser, "--methods", str, _COMPARED, f"what to compare: {', '.join((OURS, *METHODS))}")
        _option(parser, "--jobs", int, 1, "runs at a time, each in a process of its own")
        grid = "settings to choose on --holdout images, like gsm.lr=0.05,0.1 rigl.fraction=0.3,0.5 gsm:ramp=0.3,0.4"
        parser.add_argument("--tune", nargs="+", type=str, default=None, help=grid)
    if command != "prune":  # a recipe.yaml has it
        _option(parser, "--method", str, recipe.method, argparse.SUPPRESS)
    parser.add_argument("--debug", action="store_true", help="show where an error arose")
    elsewhere = {"recipe", "preset", "compression", "method", "settings"}
    defaults = {
        key: value for key, value in recipe.as_dict().items() if key not in {*elsewhere, recipe.method} - {OURS}
    }
    parser.add_class_arguments(Recipe, default=defaults, skip=elsewhere)
    for action in parser._actions:
        if action.dest.partition(".")[0] in defaults:
            action.required = False  # all have a default here, so the help is not to call them required


def _command(commands: Any, name: str, text: str, **options: Any) -> ArgumentParser:
    """Add a subcommand; `text` says what it does."""
    parser = _Parser(description=f"{text[0].upper()}{text[1:]}.", **options)
    commands.add_subcommand(name, parser, help=text)
    return parser


def _option(parser: ArgumentParser, name: str, kind: Any, default: object, text: str, *short: str) -> None:
    parser.add_argument(*short, name, type=kind, default=default, help=text)


def _shared(parser: ArgumentParser, *names: str) -> None:
    """Add options that several commands have."""
    for name in names:
        _option(parser, name, *_SHARED[name])


class _Parser(ArgumentParser):
    """A parser that raises instead of printing its usage, so that an error is one line; it takes no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(exit_on_error=False, allow_abbrev=False, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong, with the options that are meant if one is misspelt, or lacks its stage."""
        misspelt = re.match(r"unrecognized arguments: --?([^ =]+)", message)
        if misspelt and ex is None:  # else it has been said by the parser of a subcommand
            method, dot, _ = misspelt[1].partition(".")
            if dot and method in RIVALS and f"--{method}" not in self._option_string_actions:
                super().error(f"{misspelt[0]} is a setting of --method {method}: add that?", ex)
            options = [option for option in self._option_string_actions if option.startswith("--")]
            names = {
                option: {option[2:], option.rpartition(".")[2].lstrip("-")} for option in options
            }  # --lr: --gsm.lr
            near = difflib.get_close_matches(misspelt[1], set().union(*names.values()), n=1)
            meant = [option for option in options if names[option].intersection(near)]
            message += f"; did you mean {' or '.join(meant)}?" if meant else ""
        super().error(message, ex)
