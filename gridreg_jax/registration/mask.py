"""Masks on coarser lattices than their own."""

import numpy as np
from jaxtyping import Bool, Float

from gridreg_jax.data.nifti import Volume
from gridreg_jax.data.preprocess import resample


def kept(mask: Volume, affine: Float[np.ndarray, "4 4"], shape: tuple[int, int, int]) -> Bool[np.ndarray, "x y z"]:
    """Which voxels of a lattice a mask keeps: those that hold any part of it, so that a thin one does not vanish.

    Args:
      mask: labels; what is 0 does not count.
      affine: voxel of the lattice -> RAS mm.
      shape: of the lattice.
    """
    # Looked up at the middles of parts of a voxel, which are not larger than the mask's own.
    step = np.linalg.norm(np.linalg.inv(mask.affine[:3, :3]) @ affine[:3, :3], axis=0)
    parts = np.maximum(1, np.ceil(step - 1e-6)).astype(int)
    finer = np.diag([*1 / parts, 1.0])
    finer[:3, 3] = (1 / parts - 1) / 2
    across = (int(parts[0]), *(int(n) for n in shape[1:] * parts[1:]))

    def row(number: int) -> Bool[np.ndarray, "y z"]:  # one at a time: all parts together may take gigabytes
        start = np.eye(4)
        start[0, 3] = number
        found = resample(mask, affine @ start @ finer, across, labels=True) != 0
        return found.reshape(parts[0], shape[1], parts[1], shape[2], parts[2]).any(axis=(0, 2, 4))

    return np.stack([row(number) for number in range(shape[0])])
