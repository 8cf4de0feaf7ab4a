"""Every fast path of the library against its plain form: time, forward and with the gradient, and largest difference.

    python -m benchmarks.kernels [--shape 128 128 102] [--repeats 5] [--out FILE]

The plain form is what one writes first, with the same result (but that a bending energy of finite differences leaves
out the border); both run in turns.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from benchmarks.arguments import at_least, result_file
from benchmarks.hardware import hardware
from gridreg_jax import conv, losses
from gridreg_jax.attention import window_attention
from gridreg_jax.losses.similarity import FAINT
from gridreg_jax.programs import compiler_options
from gridreg_jax.transforms import bspline
from gridreg_jax.transforms.interpolation import axis_weights, interpolate
from gridreg_jax.transforms.warp import warp, warp_by_grid


def plain_warp(moving, displacement):
    """Linear interpolation by `jax.scipy.ndimage`."""
    identity = jnp.stack(jnp.meshgrid(*map(jnp.arange, displacement.shape[1:4]), indexing="ij"))
    points = identity + jnp.moveaxis(displacement[0], -1, 0)
    return map_coordinates(moving[0, ..., 0], points, order=1, mode="nearest")[None, ..., None]


def plain_interpolate(control_grid, shape):
    """One contraction with the three weight matrices at once."""
    weights = [
        jnp.asarray(axis_weights("bspline", g, n), jnp.float32)
        for g, n in zip(control_grid.shape[1:4], shape, strict=True)
    ]
    return jnp.einsum("xa,yb,zc,nabcd->nxyzd", *weights, control_grid)


def plain_dice(fixed_labels, moving_labels, displacement):
    """Overlap of one-hot volumes, each label warped by itself, plainly."""
    scores = []
    for label in (1, 2):
        fixed = (fixed_labels == label).astype(jnp.float32)
        moving = plain_warp((moving_labels == label).astype(jnp.float32)[..., None], displacement)[..., 0]
        scores.append(2 * (fixed * moving).sum((1, 2, 3)) / (fixed.sum((1, 2, 3)) + moving.sum((1, 2, 3))))
    return 1 - sum(scores) / 2


def plain_lncc(fixed, warped, window=9):
    """All voxels of a window summed at once."""
    fixed, warped = ((image - image.mean()) / image.std() for image in (fixed, warped))
    # How many voxels of a window exist: by NumPy, since XLA would take long to fold the sums of a constant.
    lines = [np.convolve(np.ones(n), np.ones(window))[window // 2 :][:n] for n in fixed.shape[1:4]]
    count = np.einsum("x,y,z->xyz", *lines)[..., None].astype(np.float32)

    def mean(values):
        cube = (1, window, window, window, 1)
        return jax.lax.reduce_window(values, 0.0, jax.lax.add, cube, (1,) * 5, "SAME") / count

    covariance = mean(fixed * warped) - mean(fixed) * mean(warped)
    variances = [mean(image**2) - mean(image) ** 2 + FAINT for image in (fixed, warped)]
    return 1 - jnp.mean((jnp.abs(covariance) + FAINT) ** 2 / (variances[0] * variances[1]), axis=(1, 2, 3, 4))


def plain_attention(query, key, value, bias, window):
    """Keys and values of every window gathered, then a softmax."""
    heads, reach = bias.shape[1], window // 2
    shape = query.shape[1:4]

    def gather(array):
        padded = jnp.pad(array, [(0, 0)] + [(reach, reach)] * 3 + [(0, 0)])
        offsets = np.ndindex(window, window, window)
        near = [padded[:, i : i + shape[0], j : j + shape[1], k : k + shape[2]] for i, j, k in offsets]
        return jnp.stack(near).reshape(len(near), *array.shape[:4], heads, -1)

    inside = gather(jnp.ones_like(query))[..., :1, :1] > 0
    logits = jnp.einsum("nxyzhd,wnxyzhd->wnxyzh", query.reshape(*query.shape[:4], heads, -1), gather(key))
    logits = jnp.where(inside[..., 0], logits + bias[:, None, None, None, None], -jnp.inf)
    return jnp.einsum("wnxyzh,wnxyzhd->nxyzhd", jax.nn.softmax(logits, axis=0), gather(value)).reshape(query.shape)


def cases(shape) -> dict:
    """Name: (fast, plain, arguments, which of them take a gradient)."""
    rng = np.random.default_rng(0)

    def normal(*size, scale=1.0):
        return jnp.asarray(scale * rng.normal(size=size), jnp.float32)

    pair, half = normal(1, *shape, 2), normal(1, *(n // 2 for n in shape), 16)
    grid, displacement = normal(1, 10, 10, 10, 3), normal(1, *shape, 3)
    moving = jnp.asarray(rng.uniform(size=(1, *shape, 1)), jnp.float32)
    fixed = moving + normal(*moving.shape, scale=0.1)
    labels = [jnp.asarray(rng.integers(0, 3, (1, *shape)), jnp.int32) for _ in range(2)]
    tokens = [normal(1, 15, 15, 15, 32, scale=0.3) for _ in range(3)] + [normal(27, 4)]

    def spline(grid):
        return interpolate(grid, shape, method="bspline")

    def strided(x, kernel):
        return conv.conv3d(x, kernel, stride=2)

    def native(x, kernel):
        return conv._native(x, kernel, 2)

    small = {k: normal(3, 3, 3, c, d, scale=0.1) for k, (c, d) in {"first": (2, 16), "next": (16, 32)}.items()}
    # Everything is an argument: XLA would take minutes to fold constants of this size.
    return {
        "convolution 2 -> 16, stride 2": (strided, native, [pair, small["first"]], (1,)),
        "convolution 16 -> 32, stride 2": (strided, native, [half, small["next"]], (0, 1)),
        "convolution 16 -> 32, stride 1": (
            conv.conv3d,
            lambda x, kernel: conv._native(x, kernel, 1),
            [half, small["next"]],
            (0, 1),
        ),
        "cubic spline to voxels": (spline, lambda grid: plain_interpolate(grid, shape), [grid], (0,)),
        "bending energy": (
            lambda grid: bspline.bending_energy(grid, shape),
            lambda grid: losses.bending_energy(spline(grid)),
            [grid],
            (0,),
        ),
        "linear warp": (warp, plain_warp, [moving, displacement], (1,)),
        "warp by a control grid": (
            lambda moving, grid: warp_by_grid([moving[..., 0]], grid, shape, method="bspline")[0],
            lambda moving, grid: warp(moving, spline(grid))[..., 0],
            [moving, grid],
            (1,),
        ),
        "local correlation, window 9": (losses.lncc, plain_lncc, [fixed, moving], (1,)),
        "soft Dice, 2 labels": (
            lambda *arguments: losses.soft_dice(*arguments, num_labels=2),
            plain_dice,
            [*labels, displacement],
            (2,),
        ),
        "attention, window 3, grid 15": (
            lambda *arguments: window_attention(*arguments, 3),
            lambda *arguments: plain_attention(*arguments, 3),
            tokens,
            (0, 1, 2),
        ),
    }


def gradient(function, of):
    """Of the mean square of what a function returns."""

    def scalar(*arguments):
        return sum(jnp.mean(leaf**2) for leaf in jax.tree.leaves(function(*arguments)))

    return jax.grad(scalar, argnums=of)


def difference(fast, plain) -> float:
    """Largest difference, relative to the largest value."""
    pairs = zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True)
    return max(float(jnp.abs(a - b).max() / (jnp.abs(b).max() + 1e-30)) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=at_least(3), nargs=3, default=(128, 128, 102), help="voxels an axis")
    parser.add_argument("--repeats", type=at_least(1), default=5)
    parser.add_argument("--out", type=result_file, help="JSON file for the result")
    options = parser.parse_args()
    machine = hardware()
    print("{device}, {cpu}, {cores} cores".format(**machine) + f"; medians of {options.repeats}, ms: fast / plain")
    rows = {}
    for name, (fast, plain, arguments, of) in cases(tuple(options.shape)).items():
        row = rows[name] = {}
        for kind, wrap in (("forward", lambda f, of: f), ("gradient", gradient)):
            pair = [jax.jit(wrap(function, of), compiler_options=compiler_options()) for function in (fast, plain)]
            row[f"{kind}_difference"] = difference(*(function(*arguments) for function in pair))
            times = ([], [])
            for _ in range(options.repeats):
                for function, durations in zip(pair, times, strict=True):
                    start = time.perf_counter()
                    jax.block_until_ready(function(*arguments))
                    durations.append(1e3 * (time.perf_counter() - start))
            row[f"{kind}_ms"], row[f"plain_{kind}_ms"] = map(statistics.median, times)
        line = "{:<34}forward {forward_ms:>7.1f} / {plain_forward_ms:<8.1f} gradient {gradient_ms:>7.1f} / "
        line += "{plain_gradient_ms:<8.1f} difference {forward_difference:.0e}, {gradient_difference:.0e}"
        print(line.format(name, **row), flush=True)
    if options.out:
        result = {"hardware": machine, "shape": options.shape, "kernels": rows}
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
