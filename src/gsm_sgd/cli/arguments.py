"""The options of the command `gsm`: its subcommands, their parsers, and the fields of a recipe as options."""

import argparse
import difflib
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace

from ..budget import Budget
from ..experiments import UsageError, bench, data, suggestion
from ..experiments.compare import parse_methods
from ..experiments.lottery import TICKETS
from ..experiments.own import NOTHING, Trusted
from ..experiments.reading import cause, read_yaml
from ..experiments.recipes import (
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
from ..export.run import Format
from ..export.sparse import Values
from . import COMMANDS, EXAMPLES

RUNS = ("prune", "lottery", "compare")
Group = Any  # a parser, or a group of its options
_COMPARED = "gsm,gradual,rigl,one_shot,dense"
_SHARED: dict[str, tuple[Any, object, str]] = {
    "--data-dir": (Path | None, None, "folder of the data; default $GSM_DATA"),
    "--device": (str, "auto", "auto, cpu, cuda, ..."),
    "--model": (str | None, None, "a file.py:function or module:function that may build the net"),
    "--dataset": (str | None, None, "one that may build the data set"),
    "--out": (Path, Path("runs"), "folder that gets the run's folder"),
}
BUDGETS = ("compression", "density", "sparsity", "target-size", "macs", "latency")
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
    """Return the options of a command, with its name, the first word, as `command`.

    The defaults of the recipe's fields are those of the recipe and preset named, so these are looked up first.
    """
    try:
        return _parsed(argv)
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
    if choice := re.search(r'expected "(\w+)" to be one of \{(.*?)\}', error):
        return f"gsm {argv[0]} takes an {choice[1]}: {choice[2].replace(',', ' or ')}"
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
    command, words = words[0], words[1:]
    recipe, methods = find_recipe("lenet300"), [OURS]
    if command in RUNS:
        words = _config_first(words)
        methods = _methods(command, words)  # of a comparison all, and the defaults are GSM's
        asked = [word for word in words if not word.startswith(("-h", "--help", "--print_config"))]
        try:
            first = _parser(command, recipe, methods).parse_args(asked)
        except argparse.ArgumentError:
            pass  # the parser below says what is wrong, or gives the help that was asked for
        else:
            recipe = find_recipe(first.recipe, first.preset)
    recipe = by_method(recipe, methods[0]) if command == "prune" else recipe
    chosen = _parser(command, recipe, methods).parse_args(words)
    chosen.command = command
    if command == "ticket":
        return Namespace(**vars(chosen[chosen.action]), command=f"ticket {chosen.action}")
    if command in RUNS:
        _one_budget(chosen, words)
    return chosen


def _one_budget(chosen: Namespace, words: Sequence[str]) -> None:
    """Set the compression ratio from another budget; UsageError if two are given."""
    given = [name for name in BUDGETS if _is_given(f"--{name}", words)]
    if len(given) > 1:
        raise UsageError(f"--{given[0]} and --{given[1]} are two budgets: leave out one of them")
    for kind, ratio in (("density", lambda share: 1 / share), ("sparsity", lambda share: 1 / (1 - share))):
        if (shares := chosen.get(kind)) is not None:
            chosen.compression = ",".join(f"{float(ratio(share)):.17g}" for share in _shares(kind, shares))


def _shares(kind: str, text: str) -> list[Fraction]:
    """Return the shares that a text like 0.9,0.95 lists, exactly."""
    try:
        shares = [Fraction(word) for word in str(text).split(",")]
        for share in shares:
            Budget.given(**{kind: float(share)})
    except (ValueError, OverflowError) as error:
        raise UsageError(f"--{kind} takes shares of the weights, like 0.9 or 0.9,0.95, not {text!r}") from error
    return shares


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
        for kind in Trusted._fields:
            if not _is_given(f"--{kind}", words) and kind in theirs:
                NOTHING.check(kind, str(theirs[kind]), path)
    return [*(f"--config={path}" for path in given.config), *rest]


def _methods(command: str, words: Sequence[str]) -> list[str]:
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
    return parse_methods(given.methods) if command == "compare" and method == OURS else [method]


def _is_given(option: str, words: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == option for word in words)


def _underscored(word: str, names: set[str]) -> str:
    """Let a recipe's fields be written with dashes too: --batch-size is --batch_size."""
    option, equals, value = word.partition("=")
    field = option[2:].replace("-", "_")
    return f"--{field}{equals}{value}" if option.startswith("--") and field in names else word


def _parser(command: str, recipe: Recipe, methods: Sequence[str]) -> ArgumentParser:
    """Return a command's parser, with the fields of `recipe` as defaults and the methods' settings as options."""
    parser = _Parser(command)
    if command in RUNS:
        _add_run_options(parser, recipe, command)
        for method in methods:
            add_settings(parser, method)
        for action in parser._actions:
            if action.dest in ("base", OURS, *RIVALS):
                action.help = argparse.SUPPRESS  # a file of a part of the settings; --config has all
    elif add_options := _OPTIONS_OF.get(command):
        add_options(parser)
    return parser


def _show(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or safetensors, sparse, HDF5 or ticket files")
    _option(parser, "--csv", Path | None, None, "also write a row for each run, with all its settings, to this file")
    _option(parser, "--metrics", Path | None, None, "also write a row for each epoch of each run to this file")
    _option(parser, "--json", Path | None, None, "also write means over the seeds to this file")


def _report(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, finished or not")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the page")


def _eval(parser: ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a run's folder, or a safetensors, sparse, HDF5 or ONNX file")
    of_file = "recipe.yaml of the run that a file is of; default the one beside it, or in a sparse file"
    _option(parser, "--recipe", Path | None, None, of_file)
    _shared(parser, "--data-dir", "--model", "--dataset")


def _export(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="the run's folder")
    _option(parser, "--format", Format, "sparse", "what to write")
    _option(parser, "--out", Path | None, None, "the file; default pruned.<ending> in the folder", "-o")
    _option(parser, "--values", Values, "float32", "what to round the weights of a sparse file to")
    _shared(parser, "--data-dir", "--model", "--dataset")  # rounded weights have their accuracy measured


def _verify(parser: ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="what gsm export --format sparse has written")
    parser.add_argument("--accuracy", action="store_true", help="measure the accuracy too, which needs the data")
    _shared(parser, "--data-dir", "--model", "--dataset")


def _ticket(parser: ArgumentParser) -> None:
    actions = parser.add_subcommands(dest="action", title="actions", description="gsm ticket ACTION --help says more")
    save = _Parser("ticket save", "store a ticket of a finished lottery: seed, mask, recipe and accuracy")
    save.add_argument("run", type=Path, help="the lottery's folder")
    _option(save, "--method", Literal[*TICKETS], "gsm", "what found it")
    _option(save, "--out", Path | None, None, "the file; default in the run's folder", "-o")
    replay = _Parser("ticket replay", "initialise a ticket's net from its seed, train it again, and compare")
    replay.add_argument("file", type=Path, help="what gsm ticket save has written")
    _shared(replay, "--out", "--data-dir", "--model", "--dataset", "--device")
    _option(replay, "--threads", int | None, None, "CPU threads; default as many as the ticket had")
    actions.add_subcommand("save", save, help=save.description)
    actions.add_subcommand("replay", replay, help=replay.description)


def _bench(parser: ArgumentParser) -> None:
    parser.add_argument("subject", type=str, help="step: GSM against SGD; inference: dense, sparse and narrow nets")
    of_what = f"of step: models of {', '.join(bench.WORKLOADS)}, default lenet300 resnet56; of inference: run folders"
    parser.add_argument("names", nargs="*", help=of_what)
    _option(parser, "--repeats", int, 9, "interleaved repetitions of each step")
    _shared(parser, "--device", "--model", "--dataset")


def _data(parser: ArgumentParser) -> None:
    parser.add_argument("dataset", type=str, help=f"which one: {', '.join(data.FETCHED)}")
    _shared(parser, "--data-dir")


_OPTIONS_OF: dict[str, Callable[[ArgumentParser], None]] = {
    "show": _show,
    "report": _report,
    "eval": _eval,
    "export": _export,
    "verify": _verify,
    "ticket": _ticket,
    "bench": _bench,
    "data": _data,
}


def _add_run_options(parser: ArgumentParser, recipe: Recipe, command: str) -> None:
    parser.add_argument("recipe", type=str, help=f"one of {', '.join(RECIPES)}")
    _option(parser, "--preset", Preset, "fast", "whose settings")
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any fields of the recipe")
    _add_budgets(parser.add_argument_group("how much is kept, in one of these ways"), recipe, command)
    if command == "prune":
        group = parser.add_argument_group("method")
        _option(group, "--method", str, recipe.method, f"what prunes: {', '.join((OURS, *RIVALS))}")
        group.add_argument("--baseline", action="store_true", help="also train the dense net, for as many epochs")
    elif command == "compare":
        group = parser.add_argument_group("comparison")
        _option(group, "--methods", str, _COMPARED, f"what to compare: {', '.join((OURS, *RIVALS))}")
        _option(group, "--jobs", int, 1, "runs at a time, each in a process of its own")
        grid = "settings to choose on --holdout images, like gsm.lr=0.05,0.1 rigl.fraction=0.3,0.5 gsm:ramp=0.3,0.4"
        group.add_argument("--tune", nargs="+", type=str, default=None, help=grid)
    if command != "prune":  # a recipe.yaml has it
        _option(parser, "--method", str, recipe.method, argparse.SUPPRESS)
    _add_running(parser.add_argument_group("running"), command)

    elsewhere = {"recipe", "preset", "compression", "method", "settings"}
    if command == "compare":
        elsewhere |= {"macs", "latency"}
    defaults = {
        key: value for key, value in recipe.as_dict().items() if key not in {*elsewhere, recipe.method} - {OURS}
    }
    parser.add_class_arguments(Recipe, default=defaults, skip=elsewhere)
    for action in parser._actions:
        if action.dest.partition(".")[0] in defaults:
            action.required = False  # all have a default here, so the help is not to call them required
        if action.dest == "print_config":
            action.help = "print all settings as YAML, for --config, and exit"


def _add_budgets(parser: Group, recipe: Recipe, command: str) -> None:
    _option(parser, "--sparsity", str | None, None, "share of the weights that is cut, like 0.9, or 0.9,0.95")
    _option(parser, "--density", str | None, None, "share of the weights that is kept, like 0.1, or 0.1,0.05")
    ratio = "C, of N weights floor(N / C) are kept, or several, like 20,60"
    _option(parser, "--compression", float | str, recipe.compression, ratio)
    if command == "compare":
        shares = "with --pattern channel: shares of the dense net's multiply-accumulates, like 0.5,0.4"
        _option(parser, "--macs", float | str, recipe.macs, shares)
    elif command == "prune":
        _option(parser, "--target-size", str | None, None, "of a sparse file, like 20KB, which then is exported")


def _add_running(parser: Group, command: str) -> None:
    _option(parser, "--seeds", str | None, None, "several runs, like 0,1,2 or 0-4")
    _option(parser, "--epochs-scale", float, 1.0, "shorten every stage, milestones too")
    _shared(parser, "--out", "--data-dir", "--device")
    _option(parser, "--threads", int | None, None, "CPU threads")
    _option(parser, "--checkpoint-seconds", float, 20.0, "time between checkpoints")
    if command != "compare":
        _option(parser, "--name", str | None, None, "of the run's folder, before ratio and seed")
        fast = "try everything in a few steps, in a folder that is then deleted"
        parser.add_argument("--fast-dev-run", action="store_true", help=fast)
        parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard event files")
    parser.add_argument("--debug", action="store_true", help="show where an error arose")


def _option(parser: Group, name: str, kind: Any, default: object, text: str, *short: str) -> None:
    parser.add_argument(*short, name, type=kind, default=default, help=text)


def _shared(parser: Group, *names: str) -> None:
    """Add options that several commands have."""
    for name in names:
        _option(parser, name, *_SHARED[name])


class _Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help in the words of a user: no types of Python's, and no default where there is nothing to say."""

    def start_section(self, heading: str | None) -> None:
        """Begin a group of options; its title may take several lines."""
        super().start_section(heading and textwrap.fill(heading, self._width - 1))

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = not action.option_strings or action.nargs == 0 or action.default in (None, argparse.SUPPRESS)
        if silent or "default" in text:
            return text
        shown = str(action.default).lower() if isinstance(action.default, bool) else "%(default)s"
        return f"{text.removesuffix('.')} (default: {shown})"


class _Parser(ArgumentParser):
    """A parser that raises instead of printing its usage, so that an error is one line; it takes no abbreviations."""

    def __init__(self, command: str, text: str = "") -> None:
        texts = {name: text for group in COMMANDS.values() for name, text in group.items()}
        text = text or texts[command]
        examples = "\n".join(["examples:", *(f"  {example}" for example in EXAMPLES.get(command, ()))])
        super().__init__(
            prog=f"gsm {command}",
            usage=f"gsm {command} RECIPE [options]" if command in RUNS else None,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=examples if command in EXAMPLES else None,
            formatter_class=_Help,
            exit_on_error=False,
            allow_abbrev=False,
        )

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
