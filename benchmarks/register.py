"""`gridreg register` on pairs of images with labels: overlap, folding and time, each pair in a fresh process.

    python -m benchmarks.register PAIRS.csv [--dataset NAME] [--task TEXT] [--preset NAME] [--out FILE]

PAIRS.csv has the columns fixed, moving, fixed_labels and moving_labels (paths relative to its folder); where it has
`dataset` and `task`, the options of these names pick rows. Dice is the mean over the labels with at least 50 voxels in
the fixed image that occur in the moving one. Seconds are from file to file, the start of Python included; the first
pair of a size compiles its programs, so every pair runs twice and the second time counts (`--runs`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.arguments import at_least, result_file
from benchmarks.hardware import hardware
from gridreg_jax.data.lists import read_table
from gridreg_jax.doorway import fail
from gridreg_jax.errors import InputError
from gridreg_jax.registration.deformable import PRESETS

LEAST_VOXELS = 50
FILES = ("fixed", "moving", "fixed_labels", "moving_labels")


def main() -> None:
    """Run the pairs, print a line for each and the means, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--task", default="", help="only tasks that contain this text")
    parser.add_argument("--dataset", default="", help="only this dataset")
    parser.add_argument("--preset", choices=PRESETS, default="balanced")
    parser.add_argument("--runs", type=at_least(1), default=2, help="of each pair; the last one counts")
    parser.add_argument("--out", type=result_file, help="JSON file for the result")
    arguments, more = parser.parse_known_args()
    try:
        pairs = read(arguments.pairs, task=arguments.task, dataset=arguments.dataset)
    except InputError as error:
        parser.error(str(error))
    rows = []
    for pair in pairs:
        rows.append(measure(pair, arguments.preset, arguments.runs, more))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    names = ("dice_before", "dice_affine", "dice", "folding_percent", "seconds")
    means = {name: round(statistics.mean(row[name] for row in rows), 4) for name in names}
    print("mean: " + "  ".join(f"{name} {value}" for name, value in means.items()))
    if arguments.out:
        # Asked at the end: until then an accelerator's memory is left to the registrations.
        result = {"hardware": hardware(), "load": os.getloadavg(), "preset": arguments.preset, "options": more}
        arguments.out.write_text(json.dumps(result | {"mean": means, "pairs": rows}, indent=1) + "\n")


def read(path: Path, *, task: str, dataset: str) -> list[dict[str, Path]]:
    """The files of every pair of a task and data set.

    Raises:
      InputError: the list, a column, such a pair, or one of its files is missing.
    """
    pairs = []
    for number, row in read_table(path, required=FILES, optional=("task", "dataset")):
        if task in row.get("task", "") and dataset in row.get("dataset", ""):
            pairs.append({name: path.parent / row[name] for name in FILES})
            for file in pairs[-1].values():
                if not file.is_file():
                    raise InputError(f"{path}: row {number}: no such file: {file}")
    if not pairs:
        raise InputError(f"{path}: no row is of dataset {dataset!r} and task {task!r}")
    return pairs


def measure(paths: dict[str, Path], preset: str, runs: int, more: list[str]) -> dict:
    """Numbers of one pair."""
    counts = np.unique(np.asarray(nib.load(paths["fixed_labels"]).dataobj), return_counts=True)
    fixed = {int(label) for label, count in zip(*counts, strict=True) if label != 0 and count >= LEAST_VOXELS}
    wanted = fixed & set(np.unique(np.asarray(nib.load(paths["moving_labels"]).dataobj)).astype(int).tolist())
    with tempfile.TemporaryDirectory() as out:
        options = [f"--{name.replace('_', '-')}={path}" for name, path in paths.items()]
        command = [sys.executable, "-m", "gridreg_jax", "register", *options, f"--out={out}", f"--preset={preset}"]
        for _ in range(runs):
            start = time.perf_counter()
            ended = subprocess.run([*command, *more], stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - start
            if ended.returncode:  # at the first pair, if one of `more` is wrong
                fail(f"gridreg register failed on {paths['fixed']} and {paths['moving']}; what it wrote is above")
        metrics = json.loads((Path(out) / "metrics.json").read_text())

    def dice(when):
        labels = metrics["dice"][when]["labels"]
        return round(statistics.mean(labels.get(str(label), 0.0) for label in wanted), 4)

    return {
        "fixed": paths["fixed"].name,
        "moving": paths["moving"].name,
        "dice_before": dice("before"),
        "dice_affine": dice("affine"),
        "dice": dice("after"),
        "folding_percent": metrics["folding_percent"],
        "invertible": metrics["certificate"]["invertible"],
        "seconds": round(seconds, 2),
    }


if __name__ == "__main__":
    main()
