"""What finished runs come to as files and in use: bytes by format, and inference by engine.

Sizes are of the pruned net as `gsm export` writes it, and of the dense file compressed as by `xz -9e`; inference is
what `gsm bench inference` measures, which takes a machine that does nothing else.

    python benchmarks/ship.py RUN... [--data-dir DIR] [--json FILE]
"""

import argparse
import json
import lzma
import tempfile
from pathlib import Path
from typing import Any

import torch

from gsm_sgd.experiments.environment import environment
from gsm_sgd.export.inference import measure_inference
from gsm_sgd.export.run import export
from gsm_sgd.export.sparse import Values, read_sparse
from gsm_sgd.reports.runs import read_run

VALUES: tuple[Values, ...] = ("float32", "float16")


def sizes(folder: Path, data_dir: Path | None) -> dict[str, Any]:
    """Return the bytes of each file, and the accuracy that its certificate states, in percent."""
    dense = (folder / "pruned.safetensors").read_bytes()
    found: dict[str, Any] = {
        "dense_bytes": len(dense),
        "xz_bytes": len(lzma.compress(dense, preset=9 | lzma.PRESET_EXTREME)),
    }
    with tempfile.TemporaryDirectory() as temporary:
        for values in VALUES:
            file = Path(temporary) / values
            export(folder, "sparse", file, values, data_dir)
            found[values] = {"bytes": file.stat().st_size, "top1": read_sparse(file).certificate.top1}
    return found


def main() -> None:
    """Measure and print each run."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    rows = []
    for folder in options.runs:
        run = read_run(folder)
        row = {"run": folder.name, "title": run.title, "seed": run.recipe["seed"], "processes": run.processes}
        row |= {"top1": run.finished()["top1"]["pruned"], **sizes(folder, options.data_dir)}
        row["inference"] = [latency._asdict() for latency in measure_inference(folder)]
        rows.append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "processes"}), flush=True)
    if options.json:
        record = {"benchmark": "ship", "environment": environment(torch.device("cpu")), "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
