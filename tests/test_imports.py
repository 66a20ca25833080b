"""Imports point up the page: each module may import only what stands above it."""

import ast
import subprocess
import sys
from pathlib import Path

import gsm_sgd

ROOT = Path(gsm_sgd.__file__).parent

# Top to bottom. A package's __init__ stands where it is listed.
ORDER = [
    "budget",
    "groups",
    "selection",
    "sharded",
    "masks",
    "rule",
    "passes",
    "fused",
    "optimizer",
    "__init__",
    "experiments/__init__",
    "experiments/recipes",
    "experiments/whole_files",
    "experiments/ranks",
    "experiments/environment",
    "experiments/splits",
    "experiments/sources",
    "experiments/mnist",
    "experiments/cifar10",
    "experiments/image_folder",
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
    "experiments/observers",
    "experiments/prune",
    "experiments/lottery",
    "reports/__init__",
    "reports/runs",
    "reports/tables",
    "reports/plots",
    "reports/nets",
    "reports/figures",
    "reports/blocks",
    "reports/accuracy",
    "reports/structure",
    "reports/production",
    "reports/html",
    "export/container",
    "export/indices",
    "export/table",
    "export/csr",
    "export/sparse",
    "export/__init__",
    "export/extras",
    "export/hdf5_file",
    "export/onnx_file",
    "export/rebuild",
    "export/verify",
    "export/run",
    "export/target",
    "export/ticket",
    "export/files",
    "export/inference",
    "arguments",
    "cli",
    "__main__",
]
LIBRARY = ORDER[:9]


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
        assert others - set(sys.stdlib_module_names) <= {"torch"}, name


def test_the_library_loads_without_the_extras():
    code = (
        "import sys\n"
        "for name in ('torchvision', 'rich', 'jsonargparse', 'safetensors', 'matplotlib', 'yaml', 'pyarrow'):\n"
        "    sys.modules[name] = None\n"
        "import gsm_sgd\n"
        "from gsm_sgd.__main__ import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("is missing: in a clone of gsm-sgd, pip install -e '.[experiments]'\n")
    assert done.stderr.count("\n") == 1
