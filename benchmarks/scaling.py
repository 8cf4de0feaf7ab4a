"""How time and memory of GridReg grow with the image and with the control grid, and the fitted exponents.

    python -m benchmarks.scaling [--sizes 64 96 128 160 192] [--grids 5 8 10 15 20] [--repeats 5] [--out FILE]

A training step (squared difference, soft Dice with two labels, bending energy, Adam, batch 1) and a prediction
(network, interpolation, warp), of images with `size`^3 voxels at grid 10, and at 96^3 voxels of every grid. An exponent
of 1 is time in proportion to the voxels. Memory is that of the compiled step: arguments, temporaries and outputs. It
runs the same on every device (on one, where there are several); on an accelerator `--peak_tflops` and `--peak_gbs` make
it say what share of these the arithmetic and the memory traffic that XLA counts took up.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from benchmarks.arguments import at_least, result_file
from benchmarks.hardware import hardware
from benchmarks.versus_torch import NUM_LABELS, make_batch, weights
from gridreg_jax.measure import make_predict
from gridreg_jax.memory import bytes_needed
from gridreg_jax.training.step import build_run, compile_steps, make_train_step, shard


def measure(size: int, grid: int, repeats: int) -> dict:
    """Medians in ms, memory in MiB, and the cost that XLA counts, of one image and grid size."""
    shape = (size,) * 3
    optimizer = dict(name="adam", learning_rate=1e-4)
    config = dict(model=dict(name="gridreg"), optimizer=optimizer, data=dict(shape=shape), grid_sizes=(grid,))
    run = build_run(config | dict(steps=1000, seed=0, batch_size=1))  # so that one device takes it
    loss = dict(interpolator=run.model.interpolator, num_labels=NUM_LABELS, grid=0.0, **weights(shape))
    step = make_train_step(run.model, run.optimizer, seed=0, loss=loss, augmentation={})
    batch = make_batch(shape)
    state, sharded = run.init_state(), shard(batch)
    compiled = compile_steps(step, state, sharded, [run.grid_size])[0][run.grid_size]
    images = jax.device_put({name: batch[name] for name in ("fixed", "moving")})
    params = jax.device_put(jax.device_get(state.params))
    predict = make_predict(run.model)
    times = {"train_ms": [], "inference_ms": []}
    for repeat in range(-1, repeats):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, sharded))
        middle = time.perf_counter()
        jax.block_until_ready(predict(params, images, run.grid_size))
        if repeat >= 0:  # the first warms up
            times["train_ms"].append(1e3 * (middle - start))
            times["inference_ms"].append(1e3 * (time.perf_counter() - middle))
    cost = compiled.gradient.cost_analysis() or {}
    return {
        "size": size,
        "grid": grid,
        **{name: statistics.median(values) for name, values in times.items()},
        "memory_mib": bytes_needed(compiled.gradient) / 2**20,
        "gflop": cost.get("flops", 0) / 1e9,
        "gbyte": cost.get("bytes accessed", 0) / 1e9,
    }


def exponent(rows: list[dict], key: str, value: str) -> float:
    """Slope of log(value) over log(key), by least squares."""
    return float(np.polyfit(*(np.log([row[name] for row in rows]) for name in (key, value)), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=at_least(3), nargs="+", default=(64, 96, 128, 160, 192), help="voxels an axis")
    parser.add_argument("--grids", type=at_least(2), nargs="+", default=(5, 8, 10, 15, 20), help="points an axis")
    parser.add_argument("--repeats", type=at_least(1), default=5)
    parser.add_argument("--peak_tflops", type=float, default=0.0, help="of the device")
    parser.add_argument("--peak_gbs", type=float, default=0.0, help="memory bandwidth of the device, GB/s")
    parser.add_argument("--out", type=result_file, help="JSON file for the result")
    options = parser.parse_args()
    if min(len(set(options.sizes)), len(set(options.grids))) < 2:
        parser.error("--sizes, --grids: an exponent is fitted over each of them: give two or more that differ")
    if (options.peak_tflops > 0) != (options.peak_gbs > 0):
        parser.error("--peak_tflops, --peak_gbs: give both or neither")
    machine = hardware()
    print("{device}, {cpu}, {cores} cores".format(**machine) + f"; medians of {options.repeats}")
    print("{:>6}{:>6}{:>12}{:>14}{:>13}".format("size", "grid", "train, ms", "inference, ms", "memory, MiB"))
    rows = {"by_size": [(size, 10) for size in options.sizes], "by_grid": [(96, grid) for grid in options.grids]}
    for name, settings in rows.items():
        rows[name] = []
        for size, grid in settings:
            row = measure(size, grid, options.repeats)
            rows[name].append(row)
            line = "{size:>6}{grid:>6}{train_ms:>12.0f}{inference_ms:>14.0f}{memory_mib:>13.0f}".format(**row)
            if options.peak_tflops > 0:
                seconds = row["train_ms"] / 1e3
                row["share_of_peak_flops"] = row["gflop"] / 1e3 / seconds / options.peak_tflops
                row["share_of_peak_bandwidth"] = row["gbyte"] / seconds / options.peak_gbs
                line += "  {share_of_peak_flops:.1%} of the flops, {share_of_peak_bandwidth:.0%} of the bandwidth"
            print(line.format(**row), flush=True)
    fitted = {}
    for name in ("train_ms", "inference_ms", "memory_mib"):
        fitted[f"{name}_over_voxels"] = exponent(rows["by_size"], "size", name) / 3
        fitted[f"{name}_over_control_points"] = exponent(rows["by_grid"], "grid", name) / 3
    print("exponents: " + ", ".join(f"{name} {value:.2f}" for name, value in fitted.items()))
    if options.out:
        result = {"hardware": machine, "repeats": options.repeats, "exponents": fitted}
        options.out.write_text(json.dumps(result | rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
