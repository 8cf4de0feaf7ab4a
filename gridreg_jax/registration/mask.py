"""Masks on coarser lattices than their own."""

import numpy as np
from jaxtyping import Bool, Float

from gridreg_jax.data.nifti import Volume


def kept(mask: Volume, affine: Float[np.ndarray, "4 4"], shape: tuple[int, int, int]) -> Bool[np.ndarray, "x y z"]:
    """Which voxels of a lattice a mask keeps: those that hold the middle of any of its voxels, or, if they are finer,
    those whose middles it holds. So a thin mask does not vanish.

    Args:
      mask: labels; what is 0 does not count.
      affine: voxel of the lattice -> RAS mm; its axes are those of the mask.
      shape: of the lattice.
    """
    to_mask, found = np.linalg.inv(mask.affine) @ affine, mask.array != 0
    for axis, count in enumerate(shape):
        step, middles = to_mask[axis, axis], to_mask[axis, 3] + to_mask[axis, axis] * np.arange(count)
        reach = max(step, 1) / 2 + 1e-6  # what lies between two voxels is of both
        ends = np.stack([np.ceil(middles - reach), np.floor(middles + reach) + 1]).clip(0, found.shape[axis])
        sums = np.insert(np.cumsum(found, axis, dtype=np.int32), 0, 0, axis)
        first, behind = (np.take(sums, end.astype(int), axis) for end in ends)
        found = behind > first
    return found
