"""Imports point up the page: each module may import only what stands above it."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import gsm_sgd

ROOT = Path(gsm_sgd.__file__).parent

# Top to bottom. A package's __init__ stands where it is listed.
ORDER = [
    "schedules",
    "budget",
    "decay",
    "scores",
    "patterns",
    "memory",
    "distributed",
    "names",
    "selection/__init__",
    "selection/threshold",
    "selection/stored",
    "selection/sharded",
    "masks",
    "rule",
    "native/__init__",
    "native/library",
    "native/kernel",
    "optim/__init__",
    "optim/states",
    "optim/checks",
    "optim/update",
    "optim/multipliers",
    "optim/sparse",
    "optim/gsm",
    "optim/gsm_adamw",
    "optim/one_phase",
    "methods/method",
    "methods/layers",
    "methods/magnitude",
    "methods/dynamic",
    "methods/at_init",
    "methods/__init__",
    "structured/labels",
    "structured/graph",
    "structured/call",
    "structured/layers",
    "structured/moves",
    "structured/arithmetic",
    "structured/tracing",
    "structured/branches",
    "structured/cost",
    "structured/choice",
    "structured/surgery",
    "structured/latency",
    "structured/channels",
    "structured/remove",
    "structured/methods",
    "structured/centripetal",
    "structured/aofp",
    "structured/compactor",
    "structured/__init__",
    "reparam/blocks",
    "reparam/partitions",
    "reparam/swap",
    "reparam/__init__",
    "__init__",
    "callbacks/loop",
    "callbacks/transformers",
    "callbacks/lightning",
    "callbacks/__init__",
    "experiments/__init__",
    "experiments/recipes",
    "experiments/reading",
    "experiments/whole_files",
    "experiments/states",
    "experiments/ranks",
    "experiments/environment",
    "experiments/splits",
    "experiments/sources",
    "experiments/mnist",
    "experiments/cifar10",
    "experiments/image_folder",
    "experiments/own",
    "experiments/own_data",
    "experiments/data",
    "experiments/models/lenet",
    "experiments/models/resnet_cifar",
    "experiments/models/densenet_cifar",
    "experiments/models/__init__",
    "experiments/bench",
    "experiments/rundir",
    "experiments/pretrained",
    "experiments/loop",
    "experiments/cutnow",
    "experiments/channels",
    "experiments/observers",
    "experiments/prune",
    "experiments/lottery",
    "experiments/plan",
    "experiments/compare",
    "reports/__init__",
    "reports/runs",
    "reports/rows",
    "reports/tables",
    "reports/nets",
    "reports/blocks",
    "reports/figures",
    "reports/frontier",
    "reports/answer",
    "reports/sweep",
    "reports/accuracy",
    "reports/structure",
    "reports/production",
    "reports/html",
    "export/container",
    "export/csr",
    "export/sparse",
    "export/__init__",
    "export/extras",
    "export/hdf5_file",
    "export/onnx_file",
    "export/rebuild",
    "export/run",
    "export/evaluation",
    "export/target",
    "export/ticket",
    "export/files",
    "export/inference",
    "cli/__init__",
    "cli/arguments",
    "cli/console",
    "cli/bench",
    "cli/show",
    "cli/runs",
    "cli/compare",
    "cli/files",
    "cli/commands",
    "__main__",
]
LIBRARY = ORDER[: ORDER.index("__init__")]


def module_of(path):
    return path.relative_to(ROOT).with_suffix("").as_posix()


def imported(path):
    """Return the package's modules that a file imports, as in ORDER, and the other packages."""
    own, others = set(), set()
    package = module_of(path).split("/")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            others.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                candidates = [
                    "/".join([*base, alias.name]),
                    "/".join([*base, alias.name, "__init__"]),
                    "/".join(base),
                    "/".join([*base, "__init__"]),
                ]
                own.add(next(name for name in candidates if name in ORDER))
    return own, others


def test_every_module_is_in_the_order():
    assert {module_of(path) for path in ROOT.rglob("*.py")} == set(ORDER)


def test_imports_point_up():
    for path in ROOT.rglob("*.py"):
        name = module_of(path)
        if name == "__init__":
            continue  # gathers the public names
        own, _ = imported(path)
        below = {other for other in own if ORDER.index(other) >= ORDER.index(name)}
        assert not below, f"{name} imports {below}, which stand below it"


def test_the_library_imports_torch_only():
    for name in LIBRARY:
        _, others = imported(ROOT / f"{name}.py")
        allowed = {"torch", "safetensors"} if name in ("masks", "structured/remove") else {"torch"}
        assert others - set(sys.stdlib_module_names) <= allowed, name


OTHER_NAMES = {"pillow": "PIL", "pyyaml": "yaml"}
"""The modules of packages whose name is another."""


def without(code, *more):
    """Run code where none of the optional packages can be imported, nor `more`."""
    optional = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {re.split(r"[\[>=]", line)[0] for lines in optional.values() for line in lines} - {"gsm-sgd"}
    blocked = sorted({*(OTHER_NAMES.get(package, package.replace("-", "_")) for package in packages), *more})
    block = f"import sys\nfor name in {blocked}:\n    sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, check=False)


def test_the_library_loads_without_the_extras():
    done = without("import gsm_sgd\nfrom gsm_sgd.__main__ import main\nsys.argv = ['gsm', 'list']\nsys.exit(main())\n")
    assert done.returncode == 2
    assert done.stderr.endswith("is missing: in a clone of gsm-sgd, pip install -e '.[experiments]'\n")
    assert done.stderr.count("\n") == 1


SPARSE = """
import torch
from torch import nn
from gsm_sgd import magnitude_masks, prunable_parameters, sparsity_table
from gsm_sgd.export import largest_size, load_sparse, save_sparse, sparse_linear
net = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
weights = prunable_parameters(net)
magnitude_masks(weights, compression=4).apply_(net)
size = save_sparse(sys.argv[1], net.state_dict(), recipe={"of": "mine"}, top1=98.5)
assert size <= largest_size(net.state_dict(), 96, recipe={"of": "mine"})
again = load_sparse(sys.argv[1])
assert all(torch.equal(again[name], tensor) for name, tensor in net.state_dict().items())
try:
    load_sparse(sys.argv[1] + ".missing")
except Exception as error:
    assert "No such file" in str(error)
sparse_linear(net)(torch.randn(2, 20))
"""


def test_sparse_files_need_no_extras(tmp_path):
    done = without(f"sys.argv = ['', {str(tmp_path / 'net')!r}]\n{SPARSE}")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "net").is_file()


def test_what_sparse_files_need_is_named():
    done = without("import gsm_sgd\nfrom gsm_sgd.export import save_sparse\n", "numpy")
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: gsm_sgd.export needs numpy: pip install numpy"
