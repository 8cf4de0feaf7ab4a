"""Run a model over pairs, measure each of them, and summarise: what validation and evaluation share."""

import functools
import time
from collections.abc import Callable, Iterable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import freeze
from scipy import ndimage

from gridreg_jax import metrics
from gridreg_jax.data.pipeline import Dataset
from gridreg_jax.errors import InputError
from gridreg_jax.instance import refine
from gridreg_jax.programs import compiler_options, stored
from gridreg_jax.transforms.interpolation import interpolate
from gridreg_jax.transforms.warp import warp, warp_labels

# Control points an axis; None for a model that predicts no control grid.
GridSize = tuple[int, int, int] | None

# What a summary shows, in this order; each has a value before and after registration.
SUMMARISED = ("dice", "tre_mm", "hd95_mm", "centroid_mm", "mse")
# Properties of the map alone: 0 for the identity, which is the map before.
OF_THE_MAP = ("folding_percent", "ndv_percent", "sd_log_jacobian")
# A grid counts as good as the best when it keeps this share of the best one's gain in similarity.
KEPT_GAIN = 0.95
# Agreement of the predicted uncertainty with the true error, where both are known.
OF_THE_UNCERTAINTY = ("sigma_error_spearman",)


def candidates(grid_sizes: Iterable[int]) -> list[GridSize]:
    """The control grids that a config's `grid_sizes` stand for, each once, coarse to fine; without any, None alone."""
    return [(size,) * 3 for size in sorted(set(grid_sizes))] or [None]


def check_fits(grid_size: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
    """Raise `InputError` for more control points an axis than the lattice has voxels."""
    if max(grid_size) > max(shape):
        sizes, voxels = ("x".join(map(str, numbers)) for numbers in (grid_size, shape))
        raise InputError(f"grid size {sizes}: the lattice has {voxels} voxels, and a control grid is coarser than that")


def make_predict(model: nn.Module, *, refinement: dict | None = None) -> Callable:
    """`predict(params, batch, grid_size)`, compiled once a grid size.

    It returns `displacement` `[N, X, Y, Z, 3]` (voxels), `warped` `[N, X, Y, Z, 1]` and, of a batch with labels,
    `warped_labels` `[N, X, Y, Z]`; with a Bayesian head also `variance` `[N, X, Y, Z, 3]` (squared voxels).

    Args:
      refinement: `steps`, `bending`, `learning_rate`, `overlap` (with a segmenter) and `folding` of the instance
        optimisation that follows a network which predicts a control grid (see `instance.refine`; the variance stays
        the network's); None, or no steps: none.
    """

    options = freeze(refinement) if refinement and refinement["steps"] else None

    def predict(params, batch: dict[str, jax.Array], grid_size: GridSize) -> dict[str, jax.Array]:
        return _predict(params, batch, model=model, grid_size=grid_size, refinement=options)

    # The library for sums serves a network alone; the steps, which are most of the time where there are any, it slows.
    return jax.jit(predict, static_argnums=(2,), compiler_options=compiler_options(library_sums=options is None))


@functools.partial(stored, static_argnames=("model", "grid_size", "refinement"))
def _predict(params, batch: dict[str, jax.Array], *, model, grid_size, refinement) -> dict[str, jax.Array]:
    prediction = model.apply(params, batch["fixed"], batch["moving"], grid_size=grid_size)
    displacement = prediction.displacement
    if refinement:
        interpolator, options = model.interpolator, dict(refinement)
        # What one of the images does not show draws nothing: the border of its view is no edge of what it shows.
        if "fixed_known" in batch:
            moving_known = batch["moving_known"].astype(jnp.float32)[..., None]
            options["mask"] = batch["fixed_known"] * warp(moving_known, displacement)[..., 0]
        options |= dict(interpolator=interpolator, label_maps=prediction.label_maps)
        control_grid = refine(prediction.control_grid, batch["fixed"], batch["moving"], **options)
        displacement = interpolate(control_grid, batch["fixed"].shape[1:4], method=interpolator)
    result = _applied(batch, displacement)
    if prediction.variance is not None:
        result["variance"] = prediction.variance
    return result


def measure(
    predict: Callable,
    params,
    dataset: Dataset,
    pairs: Iterable[tuple[int, int]],
    grid_size: GridSize | Callable[[dict[str, jax.Array]], GridSize],
    *,
    thorough: bool = False,
) -> Iterable[tuple[dict, dict[str, np.ndarray]]]:
    """For every pair, its row of measurements and the arrays they were made from (batch axis dropped).

    Dice is the mean over the labels that occur in the fixed or the warped labels, `dice_after_<label>` each of them;
    distances are in mm; seconds are those of the prediction (and of the choice of its grid) with both images on the
    device, compilation left out.
    With a Bayesian head the arrays hold `sigma_mm`, the root of the summed variances of the three components, and with
    landmarks the row holds the rank correlation of its value at the fixed landmarks with their error.

    Args:
      grid_size: of all pairs; or a function that chooses it for a batch (see `coarsest_sufficient`), and then a row
        says what it chose.
      thorough: also the slower ones: `hd95_mm` (mean over the labels in both maps), `ndv_percent`, and what Learn2Reg
        would count (`metrics.learn2reg_*`, `lumir_*`) on this lattice, of the labels without the background (which some
        of its tasks score too) and without a mask (which some have).
    """

    def run(on_device):
        size = grid_size(on_device) if callable(grid_size) else grid_size
        return size, jax.block_until_ready(predict(params, on_device, size))

    compiled = False
    for pair in pairs:
        batch = dataset.arrays([pair], known=True)
        on_device = jax.device_put(batch)
        if not compiled:
            run(on_device)
            compiled = True
        start = time.perf_counter()
        size, result = run(on_device)
        seconds = time.perf_counter() - start
        said = {"grid_size": "x".join(map(str, size))} if callable(grid_size) else {}
        yield _case(batch | result, dataset, pair, said, seconds, thorough)


def measure_function(
    register: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, float]],
    dataset: Dataset,
    pairs: Iterable[tuple[int, int]],
) -> Iterable[tuple[dict, dict[str, np.ndarray]]]:
    """As `measure`, thorough, of a function that takes two images `[X, Y, Z]` (fixed, moving) to a displacement
    `[X, Y, Z, 3]` and the seconds that it took."""
    for pair in pairs:
        batch = dataset.arrays([pair])
        displacement, seconds = register(batch["fixed"][0, ..., 0], batch["moving"][0, ..., 0])
        yield _case(batch | _applied(batch, displacement[None]), dataset, pair, {}, seconds, thorough=True)


@jax.jit
def _applied(batch: dict[str, jax.Array], displacement: jax.Array) -> dict[str, jax.Array]:
    result = {"displacement": displacement, "warped": warp(batch["moving"], displacement)}
    if "moving_labels" in batch:
        result["warped_labels"] = warp_labels(batch["moving_labels"], displacement)
    return result


def _case(
    batch: dict, dataset: Dataset, pair: tuple[int, int], said: dict, seconds: float, thorough: bool
) -> tuple[dict, dict[str, np.ndarray]]:
    """Row and arrays of a pair, from the arrays of a batch of one; `said` of the prediction is put into the row."""
    arrays = {name: np.asarray(array[0]) for name, array in batch.items()}
    if "variance" in arrays:
        squared = arrays.pop("variance") * np.square(dataset.lattice.spacing, dtype=np.float32)
        arrays["sigma_mm"] = np.sqrt(squared.sum(-1))
    row = {side: dataset.sources[index].name for side, index in zip(("fixed", "moving"), pair, strict=True)}
    row |= said | _measurements(arrays, dataset, pair, thorough)
    return row | {"seconds": seconds}, arrays


def coarsest_sufficient(
    predict: Callable, params, grid_sizes: Iterable[int], similarity: Callable
) -> Callable[[dict[str, jax.Array]], GridSize]:
    """A function that chooses a case's grid: the coarsest that keeps `KEPT_GAIN` of the best gain in similarity.

    Args:
      grid_sizes: candidates, in control points an axis.
      similarity: a loss of (fixed, warped), e.g. of `losses.SIMILARITIES`; a gain is how much a map lowers it.

    Raises (what is returned does):
      InputError: no grid's map has a similarity.

    Source: written for this library; the paper chooses one grid for all cases, on validation (section 3.1).
    """

    def choose(batch):
        before = similarity(batch["fixed"], batch["moving"])[0]
        gains = {}
        for size in candidates(grid_sizes):
            warped = predict(params, batch, size)["warped"]
            gains[size] = float(before - similarity(batch["fixed"], warped)[0])
        gains = {size: gain for size, gain in gains.items() if np.isfinite(gain)}
        if not gains:
            raise InputError("the similarity is undefined at every grid size: the network predicts no map")
        best = max(gains.values())
        return min(size for size, gain in gains.items() if gain >= best - (1 - KEPT_GAIN) * abs(best))

    return choose


def _measurements(
    arrays: dict[str, np.ndarray], dataset: Dataset, pair: tuple[int, int], thorough: bool
) -> dict[str, float]:
    spacing, row = dataset.lattice.spacing, {}
    fixed, displacement = arrays["fixed"][..., 0], arrays["displacement"]
    for when, image in (("before", arrays["moving"]), ("after", arrays["warped"])):
        row[f"mse_{when}"] = float(np.mean((fixed - image[..., 0]) ** 2))
    if dataset.has_labels:
        ids = range(1, len(dataset.label_values) + 1)
        for when, labels in (("before", arrays["moving_labels"]), ("after", arrays["warped_labels"])):
            overlaps = metrics.dice(arrays["fixed_labels"], labels, ids)
            distances = metrics.centroid_distance_mm(arrays["fixed_labels"], labels, ids, spacing)
            row[f"dice_{when}"] = _mean(overlaps.values())
            row[f"centroid_mm_{when}"] = _mean(distances.values())
            row |= {f"dice_{when}_{dataset.label_values[i - 1]}": overlaps[i] for i in ids}
            if thorough:
                row[f"hd95_mm_{when}"] = _mean(metrics.hd95_mm(arrays["fixed_labels"], labels, ids, spacing).values())
        if thorough:
            scored = arrays["fixed_labels"], arrays["moving_labels"], displacement, ids
            row["learn2reg_dice"] = _mean(metrics.learn2reg_dice(*scored).values())
            # Not finite where a label has vanished, as in Learn2Reg's evaluation.
            distances = [*metrics.learn2reg_hd95_voxels(*scored).values()]
            row["learn2reg_hd95_voxels"] = np.inf if np.inf in distances else _mean(distances)
    landmarks = dataset.landmarks(pair)
    if landmarks is not None:
        row["tre_mm_before"] = _mean(metrics.tre_mm(*landmarks, None, spacing))
        errors = metrics.tre_mm(*landmarks, displacement, spacing)
        row["tre_mm_after"] = _mean(errors)
        if thorough:
            row["learn2reg_tre_mm"] = _mean(metrics.learn2reg_tre_mm(*landmarks, displacement, spacing))
        if "sigma_mm" in arrays:
            from scipy import stats  # half a second, and 40 MiB

            sigma = ndimage.map_coordinates(arrays["sigma_mm"], landmarks[0].T, order=1, mode="nearest")
            row["sigma_error_spearman"] = float(stats.spearmanr(sigma, errors).statistic)
    row["folding_percent"] = metrics.folding_percent(displacement)
    if thorough:
        row["ndv_percent"] = metrics.ndv_percent(displacement)
        # Where Learn2Reg's LUMIR task of 2024 counts; that of 2025 does where the fixed image is above 0.
        row["lumir_ndv_percent"] = metrics.ndv_percent(displacement, dataset.sources[pair[1]].load().above_zero)
        row["learn2reg_sd_log_jacobian"] = metrics.learn2reg_sd_log_jacobian(displacement)
    row["sd_log_jacobian"] = metrics.sd_log_jacobian(displacement)
    return row


def summarise(rows: list[dict], grid_size: GridSize | Literal["auto"]) -> dict:
    """`{"grid_size", "cases", "metrics": {name: {"before", "after", "after_sd"}}}`, means and standard deviations over
    the cases where a measurement is defined; grid size "auto" where every case has its own."""
    found = {}
    for name in SUMMARISED:
        after = _values(rows, f"{name}_after")
        if after.size:
            found[name] = {"before": float(_values(rows, f"{name}_before").mean()), **_spread(after)}
    for name in OF_THE_MAP:
        after = _values(rows, name)
        if after.size:
            found[name] = {"before": 0.0, **_spread(after)}
    for name in OF_THE_UNCERTAINTY:
        if (values := _values(rows, name)).size:
            found[name] = _spread(values)
    found["seconds"] = {"after": float(np.median(_values(rows, "seconds")))}
    grid_size = list(grid_size) if isinstance(grid_size, tuple) else grid_size
    return {"grid_size": grid_size, "cases": len(rows), "metrics": found}


def score(summary: dict) -> float:
    """What validation maximises: mean Dice; without labels, minus the mean TRE; without landmarks, minus the MSE."""
    for name, sign in (("dice", 1), ("tre_mm", -1), ("mse", -1)):
        if name in summary["metrics"]:
            return sign * summary["metrics"][name]["after"]
    raise InputError("no pair of the validation has a finite similarity: the network predicts no map")


def _mean(values: Iterable[float]) -> float:
    """Mean of the values that are defined (finite); NaN if none is."""
    values = np.array(list(values), dtype=float)
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def _values(rows: list[dict], name: str) -> np.ndarray:
    values = np.array([row.get(name, np.nan) for row in rows], dtype=float)
    return values[np.isfinite(values)]


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"after": float(values.mean()), "after_sd": float(values.std(ddof=1)) if values.size > 1 else 0.0}
