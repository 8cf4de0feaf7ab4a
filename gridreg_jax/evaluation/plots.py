"""Pictures of a registered case and of a run's curves."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from gridreg_jax.files import replacing
from gridreg_jax.transforms.jacobian import jacobian_determinant

# Name of a plane, the axis across it, and the axes shown to the right and upwards.
PLANES = (("axial", 2, (0, 1)), ("coronal", 1, (0, 2)), ("sagittal", 0, (1, 2)))


def case_picture(path: Path, arrays: dict[str, np.ndarray], spacing: tuple[float, float, float], title: str) -> None:
    """Three planes (rows) of fixed, moving, warped, both differences, the deformed grid, the Jacobian determinant and,
    if there is one, the uncertainty.

    Args:
      arrays: `fixed`, `moving`, `warped` `[X, Y, Z, 1]` in [0, 1], `displacement` `[X, Y, Z, 3]` in voxels, and
        optionally `sigma_mm` `[X, Y, Z]`.
      spacing: mm, for the proportions.
    """
    fixed, moving, warped = (arrays[name][..., 0] for name in ("fixed", "moving", "warped"))
    displacement = arrays["displacement"]
    determinant = np.pad(np.asarray(jacobian_determinant(jnp.asarray(displacement)[None]))[0], 1, mode="edge")
    panels = [
        ("fixed", fixed, dict(cmap="gray", vmin=0, vmax=1)),
        ("moving", moving, dict(cmap="gray", vmin=0, vmax=1)),
        ("warped", warped, dict(cmap="gray", vmin=0, vmax=1)),
        ("moving - fixed", moving - fixed, dict(cmap="RdBu_r", vmin=-0.7, vmax=0.7)),
        ("warped - fixed", warped - fixed, dict(cmap="RdBu_r", vmin=-0.7, vmax=0.7)),
        ("deformed grid", None, {}),
        ("Jacobian determinant", determinant, dict(cmap="PiYG", vmin=0, vmax=2)),
    ]
    if "sigma_mm" in arrays:
        panels.append(("sigma (mm)", arrays["sigma_mm"], dict(cmap="magma", vmin=0, vmax=arrays["sigma_mm"].max())))
    figure = Figure(figsize=(2.4 * len(panels), 7.4), layout="constrained")
    axes = figure.subplots(len(PLANES), len(panels))
    for row, (plane, across, shown) in zip(axes, PLANES, strict=True):
        middle = fixed.shape[across] // 2
        for axis, (name, volume, options) in zip(row, panels, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            aspect = spacing[shown[1]] / spacing[shown[0]]
            if volume is None:
                below = np.take(fixed, middle, axis=across).T
                axis.imshow(below, origin="lower", cmap="gray", alpha=0.5, aspect=aspect)
                _draw_grid(axis, np.take(displacement, middle, axis=across)[..., list(shown)])
            else:
                plane_values = np.take(volume, middle, axis=across).T
                shown_map = axis.imshow(plane_values, origin="lower", aspect=aspect, **options)
                if name in ("Jacobian determinant", "sigma (mm)") and plane == "coronal":
                    figure.colorbar(shown_map, ax=axis, shrink=0.7)
            if plane == "axial":
                axis.set_title(name, fontsize=9)
        row[0].set_ylabel(plane, fontsize=9)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def loss_curves(path: Path, lines: list[dict]) -> None:
    """Training loss (every step and smoothed) with its terms, and the validation score of every grid size.

    What a run has been resumed with may be other terms and grid sizes: a curve is drawn where it has values.
    """
    train = [line for line in lines if line["kind"] == "train"]
    validation = [line for line in lines if line["kind"] == "val"]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = np.array([line["step"] for line in train])
    no_terms = ("step", "kind", "grid_size", "seconds", "waiting")
    names = dict.fromkeys(name for line in train for name in line if name not in no_terms)
    terms = {name: _values(train, name) for name in names}
    for name, values in terms.items():
        window = max(1, len(values) // 50)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        (drawn,) = left.plot(steps[window - 1 :], smooth, label=name)
        left.plot(steps, values, color=drawn.get_color(), alpha=0.15, linewidth=0.5)
    left.set(xlabel="step", title="training: loss and its unweighted terms")
    # A logarithm of a likelihood, such as that of the uncertainty, can be negative.
    if any(np.any(values < 0) for values in terms.values()):
        left.set_yscale("symlog", linthresh=1e-3)
    else:
        left.set_yscale("log")
    if terms:
        left.legend(fontsize=8)
    scores = [line["scores"] for line in validation]
    for name in dict.fromkeys(name for line in scores for name in line):
        right.plot([line["step"] for line in validation], _values(scores, name), marker=".", label=f"grid {name}")
    right.set(xlabel="step", title="validation: score, higher is better")
    if validation:
        right.legend(fontsize=8)
    _save(figure, path)


def _values(lines: list[dict], name: str) -> np.ndarray:
    """One a line, NaN where it has none."""
    return np.array([line.get(name, np.nan) for line in lines])


def _draw_grid(axis, displacement: np.ndarray, lines: int = 20) -> None:
    """Every few rows and columns of a plane, where the map takes them."""
    points = np.stack(np.indices(displacement.shape[:2]), axis=-1) + displacement
    step = max(1, max(displacement.shape[:2]) // lines)
    for line in (*points[::step], *points[:, ::step].transpose(1, 0, 2)):
        axis.plot(line[:, 0], line[:, 1], color="tab:orange", linewidth=0.6)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
