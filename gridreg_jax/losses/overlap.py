"""Overlap of label maps as a loss that the displacement can follow."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from gridreg_jax.transforms.warp import corners, identity_grid, warp

# Up to so many labels a warp for each is quicker than sums by label (on CPU).
MOST_WARPED_LABELS = 4


def soft_dice(
    fixed_labels: Int[Array, "N X Y Z"],
    moving_labels: Int[Array, "N x y z"],
    displacement: Float[Array, "N X Y Z 3"],
    *,
    num_labels: int,
    mask: Shaped[Array, "N X Y Z"] | None = None,
) -> Float[Array, " N"]:
    """One minus the mean Dice overlap, the moving labels warped linearly.

    The value is that of one-hot label maps warped trilinearly, `1 - mean over labels of 2 sum(f w) / (sum f + sum w)`.
    One-hot maps are made of `MOST_WARPED_LABELS` labels at most: memory does not grow with `num_labels`. The gradient
    reaches the displacement through the trilinear weights.

    Args:
      fixed_labels: compact ids; 0 is background, 1..num_labels are scored, any other id counts as background.
      moving_labels: the same ids, on the moving lattice.
      displacement: voxels, pull-back.
      num_labels: largest label id; static under jit.
      mask: weight of each voxel of the fixed lattice (bool or number), in both sums.

    Returns:
      One value a case, in [0, 1]. A label absent from both the fixed and the warped map is left out of the mean; with
      no label left the loss is 0.

    Source: Yan et al., Medical Physics 2026, §3.3; the soft overlap is Milletari et al., 3DV 2016, with plain sums.
    """
    fixed, moving = (jnp.where((ids > 0) & (ids <= num_labels), ids, 0) for ids in (fixed_labels, moving_labels))
    if num_labels <= MOST_WARPED_LABELS:
        maps = [warp(one[..., None], displacement)[..., 0] for one in one_hot(moving, num_labels)]
        return soft_dice_of_maps(fixed, maps, mask=mask)
    weights = jnp.ones(fixed.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
    return _mean_overlap(*_sums_by_label(fixed, moving, displacement.astype(jnp.float32), weights, num_labels))


def one_hot(labels: Int[Array, "N X Y Z"], num_labels: int) -> list[Float[Array, "N X Y Z"]]:
    """A map of ones and zeros (no unit) for each of the ids 1..num_labels, by definition."""
    return [(labels == label).astype(jnp.float32) for label in range(1, num_labels + 1)]


def soft_dice_of_maps(
    fixed_labels: Int[Array, "N X Y Z"],
    warped: Sequence[Float[Array, "N X Y Z"]],
    *,
    mask: Shaped[Array, "N X Y Z"] | None = None,
) -> Float[Array, " N"]:
    """`soft_dice`, given the warped maps of the ids 1, 2, ...; no unit, and the same source."""
    agreeing, total = [], []
    for label, weighted in enumerate(warped, start=1):
        there = fixed_labels == label
        ones = there.astype(jnp.float32)
        if mask is not None:
            weighted, ones = weighted * mask, ones * mask
        # A sum of its own for every slab across the X axis keeps float32 accurate over millions of voxels.
        agreeing.append(jnp.where(there, weighted, 0).sum((2, 3)).sum(1))
        total.append((weighted + ones).sum((2, 3)).sum(1))
    return _mean_overlap(jnp.stack(agreeing, axis=-1), jnp.stack(total, axis=-1))


def soft_dice_of_probabilities(
    fixed: Float[Array, "N X Y Z L"],
    warped: Float[Array, "N X Y Z L"],
    *,
    mask: Shaped[Array, "N X Y Z"] | None = None,
) -> Float[Array, " N"]:
    """One minus the mean over labels of `(2 sum(f w) + 1) / (sum f^2 + sum w^2 + 1)`.

    It is 0 where both say the same, however unsure they are. The voxel that is added to both sums keeps a label which
    is nowhere likely from counting like one that is there.

    Args:
      fixed, warped: probability of each label.
      mask: weight of each voxel, in all sums.

    Returns:
      One value a case, in [0, 1). A label of which both have nothing counts as matched.

    Source: Milletari et al., 3DV 2016.
    """
    weights = 1.0 if mask is None else mask[..., None].astype(jnp.float32)
    agreeing, total = weights * fixed * warped, weights * (fixed**2 + warped**2)
    # A sum of its own for every slab, as above.
    agreeing, total = (values.sum((2, 3)).sum(1) for values in (agreeing, total))
    return 1 - jnp.mean((2 * agreeing + 1) / (total + 1), axis=-1)


def segmentation_loss(logits: Float[Array, "N X Y Z L"], labels: Int[Array, "N X Y Z"]) -> Float[Array, " N"]:
    """Mean cross-entropy plus one minus the mean Dice overlap of the labels that occur.

    Args:
      logits: logarithms of the probabilities of background and the labels 1, 2, ..., up to a constant.
      labels: compact ids.

    Source: Isensee et al., Nature Methods 2021.
    """
    log_probabilities = jax.nn.log_softmax(logits)
    right = jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
    # Of a label that does not occur, the cross-entropy alone tells what is predicted of it.
    occurs = jnp.stack([jnp.any(labels == label, (1, 2, 3)) for label in range(1, logits.shape[-1])], axis=-1)
    maps = jnp.exp(log_probabilities[..., 1:]) * occurs[:, None, None, None]
    return soft_dice_of_maps(labels, list(jnp.moveaxis(maps, -1, 0))) - right.mean((1, 2, 3))


def _mean_overlap(agreeing, total):
    """One minus the mean Dice of the labels that occur, from the sums `[N, L]` of `f w` and of f and w."""
    present = total > 0
    overlap = jnp.where(present, 2 * agreeing / jnp.where(present, total, 1.0), 1.0)
    return jnp.sum(1 - overlap, axis=-1) / jnp.maximum(present.sum(-1), 1)


def _sums_by_label(fixed, moving, displacement, weights, num_labels):
    """By label `[N, L]`: sum of `f w`, and sum of f and w, over the voxels of each label."""
    points = identity_grid(fixed.shape[1:]) + displacement
    case = jnp.arange(len(fixed)).reshape(-1, 1, 1, 1)
    # Sums by label over the voxels and their corners. On CPU, at 96^3 with 135 labels, forward and gradient take a
    # fifth of the time of one-hot products in chunks. Slabs as above.
    slab = case * fixed.shape[1] + jnp.arange(fixed.shape[1]).reshape(-1, 1, 1)

    def sum_by_label(values, labels):
        bins = (labels + slab * (num_labels + 1)).ravel()
        sums = jax.ops.segment_sum(values.ravel(), bins, slab.size * (num_labels + 1))
        return sums.reshape(*fixed.shape[:2], num_labels + 1).sum(1)[:, 1:]

    agreeing, warped_sum = 0.0, 0.0
    for index, weight in corners(points, moving.shape[1:]):
        label = moving.ravel()[index + case * moving[0].size]
        agreeing += jnp.where(label == fixed, weight * weights, 0.0)
        warped_sum += sum_by_label(weight * weights, label)
    return sum_by_label(agreeing, fixed), sum_by_label(weights, fixed) + warped_sum
