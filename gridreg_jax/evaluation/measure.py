"""Run a model over pairs and measure each of them."""

import time
from collections.abc import Callable, Iterable

import jax
import numpy as np
from flax import linen as nn

from gridreg_jax import metrics
from gridreg_jax.data.pipeline import Dataset
from gridreg_jax.transforms.warp import warp, warp_labels


def make_predict(model: nn.Module) -> Callable:
    """`predict(params, batch, grid_size)`: displacement, warped image and, with labels, warped labels; compiled once a
    grid size."""

    def predict(params, batch: dict[str, jax.Array], grid_size: tuple[int, int, int]) -> dict[str, jax.Array]:
        displacement = model.apply(params, batch["fixed"], batch["moving"], grid_size=grid_size).displacement
        result = {"displacement": displacement, "warped": warp(batch["moving"], displacement)}
        if "moving_labels" in batch:
            result["warped_labels"] = warp_labels(batch["moving_labels"], displacement)
        return result

    return jax.jit(predict, static_argnums=(2,))


def measure(
    predict: Callable, params, dataset: Dataset, pairs: Iterable[tuple[int, int]], grid_size: tuple[int, int, int]
) -> Iterable[tuple[dict, dict[str, np.ndarray]]]:
    """For every pair, its row of measurements and the arrays they were made from (batch axis dropped).

    Dice is the mean over the labels that occur in the fixed or the warped labels, `dice_after_<label>` each of them;
    distances are in mm; seconds are those of the prediction with both images on the device, compilation left out.
    """
    warmed = False
    for pair in pairs:
        batch = dataset.arrays([pair])
        on_device = jax.device_put(batch)
        if not warmed:
            jax.block_until_ready(predict(params, on_device, grid_size))
            warmed = True
        start = time.perf_counter()
        result = jax.block_until_ready(predict(params, on_device, grid_size))
        seconds = time.perf_counter() - start
        arrays = {name: np.asarray(array[0]) for name, array in {**batch, **result}.items()}
        row = {side: dataset.sources[index].name for side, index in zip(("fixed", "moving"), pair, strict=True)}
        row |= _measurements(arrays, dataset, pair)
        yield row | {"seconds": seconds}, arrays


def _measurements(arrays: dict[str, np.ndarray], dataset: Dataset, pair: tuple[int, int]) -> dict[str, float]:
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
    landmarks = dataset.landmarks(pair)
    if landmarks is not None:
        row["tre_mm_before"] = _mean(metrics.tre_mm(*landmarks, None, spacing))
        row["tre_mm_after"] = _mean(metrics.tre_mm(*landmarks, displacement, spacing))
    row["folding_percent"] = metrics.folding_percent(displacement)
    row["sd_log_jacobian"] = metrics.sd_log_jacobian(displacement)
    return row


def score(summary: dict) -> float:
    """What validation maximises: mean Dice; without labels, minus the mean TRE; without landmarks, minus the MSE."""
    for name, sign in (("dice", 1), ("tre_mm", -1), ("mse", -1)):
        if name in summary["metrics"]:
            return sign * summary["metrics"][name]["after"]
    raise ValueError("a summary without any measurement")


def _mean(values: Iterable[float]) -> float:
    """Mean of the values that are defined (not NaN); NaN if none is."""
    values = np.array(list(values), dtype=float)
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
