"""`gridreg register` on pairs of images with labels: overlap, folding and time, each pair in a fresh process.

    python -m benchmarks.register PAIRS.csv [--dataset NAME] [--task TEXT] [--preset NAME] [--out FILE]

PAIRS.csv has the columns fixed, moving, fixed_labels and moving_labels (paths relative to its folder); where it has
`dataset` and `task`, the options of these names pick rows. Dice is the mean over the labels with at least 50 voxels in
the fixed image that occur in the moving one. Seconds are from file to file, the start of Python included; the first
pair of a size compiles its programs, so every pair runs twice and the second time counts (`--runs`).
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

LEAST_VOXELS = 50


def main() -> None:
    """Run the pairs, print a line for each and the means, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--task", default="", help="only tasks that contain this text")
    parser.add_argument("--dataset", default="", help="only this dataset")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--runs", type=int, default=2, help="of each pair; the last one counts")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments, more = parser.parse_known_args()
    with arguments.pairs.open(newline="") as file:
        pairs = [
            row
            for row in csv.DictReader(file)
            if arguments.task in row.get("task", "") and arguments.dataset in row.get("dataset", "")
        ]
    rows = []
    for pair in pairs:
        rows.append(measure(pair, arguments.pairs.parent, arguments.preset, arguments.runs, more))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    names = ("dice_before", "dice_affine", "dice", "folding_percent", "seconds")
    means = {name: round(statistics.mean(row[name] for row in rows), 4) for name in names}
    print("mean: " + "  ".join(f"{name} {value}" for name, value in means.items()))
    if arguments.out:
        result = {"preset": arguments.preset, "options": more, "cpus": len(os.sched_getaffinity(0))}
        result |= {"machine": platform.processor() or platform.machine(), "load": os.getloadavg()}
        arguments.out.write_text(json.dumps(result | {"mean": means, "pairs": rows}, indent=1) + "\n")


def measure(pair: dict, root: Path, preset: str, runs: int, more: list[str]) -> dict:
    """Numbers of one pair."""
    paths = {name: root / pair[name] for name in ("fixed", "moving", "fixed_labels", "moving_labels")}
    counts = np.unique(np.asarray(nib.load(paths["fixed_labels"]).dataobj), return_counts=True)
    fixed = {int(label) for label, count in zip(*counts, strict=True) if label != 0 and count >= LEAST_VOXELS}
    wanted = fixed & set(np.unique(np.asarray(nib.load(paths["moving_labels"]).dataobj)).astype(int).tolist())
    with tempfile.TemporaryDirectory() as out:
        options = [f"--{name.replace('_', '-')}={path}" for name, path in paths.items()]
        command = [sys.executable, "-m", "gridreg_jax", "register", *options, f"--out={out}", f"--preset={preset}"]
        for _ in range(runs):
            start = time.perf_counter()
            subprocess.run([*command, *more], check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - start
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
