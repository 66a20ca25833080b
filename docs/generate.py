"""Write the tables of results in README.md and docs/ from results/*.json, those of settings from the code.

A table stands between `<!-- FUNCTION ARGUMENTS -->` and `<!-- end -->`; the functions are below.

    python docs/generate.py
"""

import importlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from gsm_sgd.methods import METHODS
from gsm_sgd.structured import METHODS as CHANNEL_METHODS

ROOT = Path(__file__).parent.parent
PAGES = {
    page: "../" * page.count("/")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    for page in [path.relative_to(ROOT).as_posix()]
}
"""The pages, and how each gets to the root of the repository."""

MODELS = {"lenet300": "LeNet-300-100", "lenet5": "LeNet-5", "resnet": "ResNet-", "gpt2": "GPT-2"}
TITLES = {
    "base": "base net",
    "gsm_before_cut": "before the cut",
    "gsm_after_cut": "after the cut",
    "pruned": "pruned net",
    "ticket_gsm": "ticket by GSM",
    "ticket_magnitude": "ticket by magnitude",
    "one_shot": "one-shot magnitude",
    "retrained": "one-shot, retrained",
    "GSM, paper": "GSM, the published schedule shortened",
    "|w| as importance": "magnitude as score",
}
COLUMNS = {
    "main": ("base", "pruned", "the paper's base net", "the paper's pruned net"),
    "pruned": ("aim", "gsm_before_cut", "gsm_after_cut", "pruned"),
    "lottery": ("base", "gsm_before_cut", "gsm_after_cut", "pruned", "ticket_gsm", "ticket_magnitude"),
    "time": ("pruned", "seconds"),
    "deep": ("base", "gsm_before_cut", "gsm_after_cut", "pruned", "lost"),
}


def render(text: str, root: str) -> str:
    """Return a page with its tables made again."""

    def block(match: re.Match[str]) -> str:
        function, *words = match[1].split()
        table = globals()[function](*words).replace("](results/", f"]({root}results/")
        return f"<!-- {match[1]} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- (\w[^\n]*) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


# --- accuracy ---


def accuracy(kind: str, *words: str) -> str:
    """Return top-1 of runs, NAME or NAME=AIM; below the paper's row where the columns are those of its tables."""
    rows, shown = [], None
    for name, aim in (word.partition("=")[::2] for word in words):
        record = _read(name)
        top1, paper, recipe = record["top1"], record["paper"], record["recipe"]
        net = _name(f"{recipe['model']}, {recipe['compression']:g}x, ")
        if paper and paper != shown and kind in ("lottery", "deep"):
            theirs = {**paper, "gsm_after_cut": paper["pruned"], "lost": paper["base"] - paper["pruned"]}
            rows.append([f"{net}the paper", "", "", *_cells(theirs, COLUMNS[kind])])
        shown = paper
        values = {**top1, "aim": aim.replace("-", " to "), "seconds": f"{fmean(record['seconds']):.0f}"}
        values |= {f"the paper's {TITLES[key]}": (paper or {}).get(key) for key in ("base", "pruned")}
        if "base" in top1:
            values["lost"] = top1["base"]["mean"] - top1["pruned"]["mean"]
        published = str(recipe.get("weights")).endswith(".th")  # a base net that others have trained
        stages = ["gsm"] if published or recipe.get("start") == "init" else ["base", "gsm"]
        epochs = " + ".join(str(recipe[stage]["epochs"]) for stage in stages)
        seeds = ", ".join(map(str, record["seeds"]))
        rows.append([_link(f"{net}`{recipe['preset']}`", name), epochs, seeds, *_cells(values, COLUMNS[kind])])
    return _table(["", "epochs", "seeds", *map(_name, COLUMNS[kind])], rows)


def headline(*words: str) -> str:
    """Return what a dense net, GSM and the best other method reach in as many epochs.

    A word is NAME@RATIO of a comparison, or NAME of runs of GSM alone; what an empty cell stands for has not been
    measured.
    """
    rows = []
    for word in words:
        name, _, ratio = word.partition("@")
        record = _read(name)
        if record.get("benchmark") == "adaptive":
            net, length = f"transformer, {ratio}x, bits per byte", f"{record['steps']:,} steps"
            bits = {cell["title"]: cell["test"] for cell in record["rows"] if cell["compression"] in (1, float(ratio))}
            best = min((row for row in bits if not row.startswith(("GSM", "dense"))), key=lambda row: bits[row]["mean"])
            cells = [_cell(bits["dense"], 3), _cell(bits["GSM, |w g|"], 3), f"{_cell(bits[best], 3)} ({best})"]
        elif ratio:
            net, length = f"{record['model']}, {ratio}x", f"{record['epochs']} epochs"
            top1 = {method: of[ratio] for method, of in record["methods"].items() if ratio in of}
            gsm = _gsm_in(top1)
            dense = next(iter(record["methods"].get("dense net", {}).values()), None)  # it is at 1x
            best = max((m for m in top1 if not m.startswith(("GSM", "dense"))), key=lambda m: top1[m]["mean"])
            cells = [_cell(dense), _cell(gsm), f"{_cell(top1[best])} ({best})"]
        elif "top1" in record:
            recipe, top1 = record["recipe"], record["top1"]
            fewer = " fewer MACs, by channels" if recipe.get("pattern") == "channel" else ""
            net, length = f"{recipe['model']}, {recipe['compression']:.3g}x{fewer}", f"{recipe['gsm']['epochs']} epochs"
            base = f"; it starts from {_cell(top1['base'])}" if "base" in top1 else ""
            cells = ["", f"{_cell(top1['pruned'])}{base}", ""]
        else:
            dense, pruned = (f"{row['bits_per_byte']:.2f}" for row in record["rows"])
            net = f"transformer, {record['rows'][1]['compression']}x, bits per byte"
            length, cells = f"{record['steps']:,} steps", [dense, pruned, ""]
        rows.append([_link(_name(net), name), length, *cells])
    return _table(["net", "length", "dense net", "GSM", "best other method"], rows)


def narrow(*names: str) -> str:
    """Return top-1 of runs that have pruned channels, what narrow nets cost, and how many times as fast they are."""
    rows, places = [], [("torch", 1), ("torch", 16), ("torch", 256), ("onnxruntime", 1), ("onnxruntime", 256)]
    for name in names:
        record = _read(name)
        first, ms = record["runs"][0], {}
        for row in record["inference"]:
            if row["threads"] == 1:
                ms[row["engine"], row["batch"]] = row["milliseconds"]
        times = [ms[f"{engine}, dense", batch] / ms[f"{engine}, narrow", batch] for engine, batch in places]
        fewer = [first[kind]["dense"] / first[kind]["pruned"] for kind in ("macs", "parameters")]
        recipe = record["recipe"]
        title = _link(f"{_name(recipe['model'])}, {recipe.get('method', 'gsm')}", name)
        cells = _cells(record["top1"], ("base", "gsm_after_cut", "pruned"))
        seeds = ", ".join(map(str, record["seeds"]))
        rows.append([title, str(recipe["gsm"]["epochs"]), seeds, *cells, *(f"{x:.2f}" for x in (*fewer, *times))])
    titles = ["base net", "after the cut", "pruned net", "times fewer MACs", "times fewer parameters"]
    return _table(["", "epochs", "seeds", *titles, *(f"{engine}, batch {batch}" for engine, batch in places)], rows)


def figures(*names: str) -> str:
    """Return all means and deviations of benchmarks: a row for each net, method or variant."""
    records = [_read(name) for name in names]
    kinds = ("rows", "methods", "variants")
    rows = {title: row for record in records for kind in kinds for title, row in record.get(kind, {}).items()}
    keys = list(next(iter(rows.values())))
    titles = [f"{key}x" if key.isdigit() else _name(key) for key in keys]
    return _table(["", *titles], [[_name(title), *_cells(row, keys)] for title, row in rows.items()])


def instructions(first: str, *names: str) -> str:
    """Return whether other instruction sets give the same nets."""
    there = {run["seed"]: (run["top1"], run["layers"]) for run in _read(first)["runs"]}
    rows = []
    for name in names:
        record = _read(name)
        same = all((run["top1"], run["layers"]) == there[run["seed"]] for run in record["runs"])
        used = record["processes"][0][0]["instructions"]
        rows.append([_link(used, name), *_cells(record["top1"], ["pruned"]), "yes" if same else "no"])
    return _table(["instruction set", "pruned net", "same accuracy and weights per layer"], rows)


def numbers(name: str) -> str:
    """Return the rows of a file as they are, those within rows too."""
    rows = []
    for row in _read(name)["rows"]:
        inner = {f"{key}: {k}": v for key, value in row.items() if isinstance(value, dict) for k, v in value.items()}
        rows.append({key: value for key, value in row.items() if not isinstance(value, dict)} | inner)
    return _table(list(rows[0]), [[v if isinstance(v, str) else f"{v:,}" for v in row.values()] for row in rows])


def adaptive(name: str) -> str:
    """Return bits per byte of the language model by method and ratio."""
    rows: dict[str, dict[str, Any]] = {}
    for cell in _read(name)["rows"]:
        rows.setdefault(cell["title"], {})[f"{cell['compression']:g}"] = cell["test"]
    ratios = sorted({ratio for row in rows.values() for ratio in row}, key=float)
    table = [[row, *(_cell(bits.get(ratio), 3) for ratio in ratios)] for row, bits in rows.items()]
    return _table(["bits per byte", *(f"{ratio}x" for ratio in ratios)], table)


# --- speed and size ---


def steps(name: str) -> str:
    """Return milliseconds of SGD, ratios of the others to it or to AdamW, and their memory in % of the weights."""
    rows, methods = [], ("GSM", "GSM, torch operations", "published approach", "GSMAdamW")
    for model, result in _read(name)["models"].items():
        costs = {cost["name"]: cost for cost in result["costs"]}
        ratios = [f"{costs[method]['ratio']:.1f}" for method in methods]
        memory = [f"{costs[method]['extra_mib'] * 2**20 / (4 * result['parameters']):.0%}" for method in methods]
        title = f"{_name(model)}, {result['parameters']:,}"
        dense = [f"{costs[of]['milliseconds']:.3g} ms" for of in ("SGD, fused", "AdamW, fused")]
        rows.append([title, *dense, *ratios, *memory])
    titles = [*methods[:-1], "GSMAdamW / AdamW"]
    return _table(["parameters", "SGD", "AdamW", *titles, *(f"memory: {method}" for method in methods)], rows)


def training(quantity: str, *names: str) -> str:
    """Return seconds or images_per_second of training."""
    keys = ["plain loop", "its loading", "ours, contiguous", "ours (channels_last, float32)", "ours, bfloat16"]
    rows = []
    for name in names:
        record = _read(name)
        chosen = record["rows"]["ours, bfloat16" if record.get("auto") == "bfloat16" else keys[3]]
        measured = [str(record["rows"].get(key, {}).get(quantity, "")) for key in keys]
        sgd = record["rows"].get("SGD, bfloat16" if record.get("auto") == "bfloat16" else "SGD, float32")
        against = "" if sgd is None else f"{chosen['seconds'] / sgd['seconds']:.2f}"
        rows.append([_link(_name(name.partition("-")[2]), name), *measured, f"{chosen['ratio']:.2f}", against])
    return _table(["", *keys, "default / plain loop", "an epoch, in epochs of SGD"], rows)


def sizes(name: str) -> str:
    """Return bytes of pruned nets as files."""
    rows = []
    for row in _read(name)["rows"]:
        files = [
            f"{row[key]['bytes']:,} (1/{row['dense_bytes'] / row[key]['bytes']:.0f})" for key in ("float32", "float16")
        ]
        top1 = [f"{row[key]['top1']:.2f}" for key in ("float32", "float16")]
        rows.append([_name(row["title"]), f"{row['dense_bytes']:,}", f"{row['xz_bytes']:,}", *files, *top1])
    return _table(["", "dense file", "its `.xz`", "sparse file", "in float16", "top-1", "top-1 in float16"], rows)


def inference(name: str) -> str:
    """Return how many times as fast as dense torch pruned nets are."""
    engines = {"torch, linear layers in CSR": "CSR", "onnxruntime, dense": "onnxruntime"}
    rows = []
    for row in _read(name)["rows"]:
        for threads, times in groupby(row["inference"], lambda time: time["threads"]):
            ratio = {(time["engine"], time["batch"]): f"{time['ratio']:.2f}" for time in times}
            keys = [key for engine in engines for key in ratio if key[0] == engine]
            rows.append([_name(row["title"]), str(threads), *(ratio[key] for key in keys)])
    return _table(["", "threads", *(f"{engines[engine]}, batch {batch}" for engine, batch in keys)], rows)


def sharded(name: str) -> str:
    """Return what a process sends in a step, and the step's time as a multiple of SGD's."""
    rows, titles = [], []
    for weights, group in groupby(_read(name)["rows"], lambda row: row["weights"]):
        by_ranks = {row["ranks"]: row for row in group}
        titles = ["weights", *map(str, by_ranks)]
        cells = [
            f"{r['bytes'] / 1000:.1f} KB" + (f", {r['ratio']:.1f}" if "ratio" in r else "") for r in by_ranks.values()
        ]
        rows.append([f"{weights:,}", *cells])
    return _table(titles, rows)


# --- methods ---


def settings(path: str) -> str:
    """Return the settings of a class or function by its path, their defaults, and what its docstring says of them."""
    module, _, name = path.rpartition(".")
    made = getattr(importlib.import_module(module), name)
    if hasattr(made, "settings"):  # those of a method, without its budget
        defaults = made.settings()
    else:
        arguments = inspect.signature(made).parameters.values()
        defaults = {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}
    texts = {key: _argument(made, key) for key in defaults}
    rows = []
    for text, keys in groupby(defaults, texts.__getitem__):
        names = list(keys)
        values = dict.fromkeys(json.dumps(v) if isinstance(v, str) else str(v) for v in map(defaults.get, names))
        rows.append([", ".join(f"`{key}`" for key in names), ", ".join(f"`{value}`" for value in values), text])
    return _table(["setting", "default", "meaning"], rows) if rows else "It has no settings of its own."


def _argument(made: Any, key: str) -> str:
    """Return the first sentence of a docstring about an argument, an inherited one if it only says "as of ..."."""
    entry = re.compile(r"^    (\w[\w, ]*): (.*?)(?=\n    \w|\n\n|\Z)", re.MULTILINE | re.DOTALL)
    documented = [one.__doc__ for one in (made.__mro__ if inspect.isclass(made) else [made]) if one.__doc__]
    entries = [found for text in documented for found in entry.findall(inspect.cleandoc(text))]
    texts = [" ".join(text.split()) for names, text in entries if key in names.split(", ")]
    sentences = [re.split(r"(?<=[^.]\.)\s", text)[0].rstrip(".").replace("|", "\\|") for text in texts]
    return next((text for text in sentences if not text.startswith("as of ")), sentences[0])


def measured(method: str) -> str:
    """Return what was measured of a method other than GSM: on channels as `narrow` has it, else beside GSM."""
    records = {path.stem: _read(path.stem) for path in sorted((ROOT / "results").glob("*.json"))}
    runs = [name for name, record in records.items() if record.get("recipe", {}).get("method") == method]
    if runs and method in CHANNEL_METHODS:
        return narrow(*runs)
    rows = [row for name, record in records.items() for row in _against_gsm(method, name, record)]
    if not rows:
        return "Nothing has been measured yet."
    return _table(["top-1 in %", "epochs", f"`{method}`", "`gsm`"], rows)


def _against_gsm(method: str, name: str, record: Any) -> Iterator[list[str]]:
    """Yield what a file says of a method on weights: net, epochs, its top-1, and GSM's on the same net."""
    title = METHODS[method].title if method in METHODS else None
    if title in record.get("methods", {}):
        theirs, ours = record["methods"][title], _gsm_in(record["methods"])
        for ratio in theirs:
            net = _name(f"{record['model']}, {ratio}x")
            yield [_link(net, name), str(record["epochs"]), *_cells(theirs, [ratio]), *_cells(ours, [ratio])]
    elif method == "one_shot" and record.get("benchmark") == "one-shot":
        for row, top1 in record["rows"].items():
            net, _, epochs = row.partition(", ")
            yield [_link(_name(net), name), epochs.removesuffix(" epochs"), *_cells(top1, ["retrained", "pruned"])]
    elif record.get("recipe", {}).get("method") == method:
        recipe = record["recipe"]
        net = _name(f"{recipe['model']}, {recipe['compression']:g}x")
        yield [_link(net, name), str(recipe["gsm"]["epochs"]), *_cells(record["top1"], ["pruned"]), ""]


def _gsm_in(methods: dict[str, Any]) -> Any:
    """Return what a comparison has of GSM, which files of the script before `gsm compare` have by preset."""
    return methods.get("GSM") or methods["GSM, fast"]


# --- cells ---


def _read(name: str) -> Any:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def _cells(figures: dict[str, Any], keys: Iterable[str]) -> list[str]:
    """Return figures as text: numbers, or means and deviations; nothing where there is none."""
    return [_cell(figures.get(key)) for key in keys]


def _cell(figure: Any, digits: int = 2) -> str:
    if isinstance(figure, dict):
        deviation = "" if figure.get("std") is None else f" ± {figure['std']:.{digits}f}"
        return f"{figure['mean']:.{digits}f}{deviation}"
    return f"{figure:.{digits}f}" if isinstance(figure, float) else figure or ""


def _link(text: str, name: str) -> str:
    return f"[{text}](results/{name}.json)"


def _name(text: str) -> str:
    """Return what people call a model, a column or a row."""
    for model, name in MODELS.items():
        text = text.replace(model, name)
    return TITLES.get(text, text)


if __name__ == "__main__":
    for page, root in PAGES.items():
        (ROOT / page).write_text(render((ROOT / page).read_text(), root))
