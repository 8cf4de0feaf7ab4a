"""Every model of the library and of a config's argument: parameters, arithmetic, memory and time of a prediction.

    python -m benchmarks.models [--shape 96 96 96] [--grid 10] [--repeats 3] [--only gridreg voxelmorph] [--out FILE]

A prediction is network, interpolation and warp of one pair, with random parameters. Memory is what XLA reports of the
compiled program. Arithmetic is what it counts in the program as it would be for a GPU, whose convolutions are whole: on
the CPU they are loops over slices, and what a loop does is counted once.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from benchmarks.arguments import at_least, result_file
from benchmarks.hardware import hardware
from benchmarks.versus_torch import make_batch
from configs.models import MODELS
from gridreg_jax.measure import make_predict
from gridreg_jax.memory import bytes_needed
from gridreg_jax.models import MODELS as REGISTERED
from gridreg_jax.models import build, has_control_grid


def measure(model, shape: tuple[int, int, int], grid: int, repeats: int) -> dict:
    """What the table shows of a model."""
    grid_size = (grid,) * 3 if has_control_grid(model) else None
    images = {name: array for name, array in make_batch(shape).items() if name in ("fixed", "moving")}
    image = jax.ShapeDtypeStruct(images["fixed"].shape, np.float32)
    params = model.lazy_init(jax.random.key(0), image, image, grid_size=grid_size)
    predict = make_predict(model)
    traced = predict.trace(params, images, grid_size)
    cost = traced.lower(lowering_platforms=("cuda",)).cost_analysis() or {}
    compiled = traced.lower().compile()
    durations = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(params, images))
        durations.append(1e3 * (time.perf_counter() - start))
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "gflop": cost.get("flops", 0) / 1e9,
        "memory_mib": bytes_needed(compiled) / 2**20,
        "ms": statistics.median(durations[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=at_least(3), nargs=3, default=(96, 96, 96), help="voxels an axis")
    parser.add_argument("--grid", type=at_least(2), default=10, help="control points an axis, of models that have them")
    parser.add_argument("--repeats", type=at_least(1), default=3)
    parser.add_argument("--only", nargs="+", help="names of models; all by default")
    parser.add_argument("--out", type=result_file, help="JSON file for the result")
    options = parser.parse_args()
    known = {name: dict(name=name) for name in REGISTERED} | {name: entry["fields"] for name, entry in MODELS.items()}
    unknown = set(options.only or ()) - set(known)
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))} not known; known are {', '.join(known)}")
    # What is kept traced is for one platform; arithmetic is counted as on another.
    jax.config.update("jax_compilation_cache_dir", None)
    machine = hardware()
    print(f"{'x'.join(map(str, options.shape))} voxels, " + "{device}, {cpu}, {cores} cores".format(**machine))
    print(f"{'':<24}{'parameters':>12}{'GFLOP':>9}{'MiB':>8}{'ms':>9}")
    rows = {}
    for name in options.only or known:
        row = rows[name] = measure(build(**known[name]), tuple(options.shape), options.grid, options.repeats)
        print(f"{name:<24}{row['parameters']:>12,}{row['gflop']:>9.1f}{row['memory_mib']:>8.0f}{row['ms']:>9.0f}")
    if options.out:
        result = {"hardware": machine, "shape": options.shape, "grid": options.grid, "models": rows}
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
