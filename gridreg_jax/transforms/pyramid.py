"""Lattices of half the resolution: images to them, and displacements back.

A coarse voxel is a block of 2 x 2 x 2 fine ones and sits in its middle, at 2 i + 1/2; the last plane of an odd number
makes blocks of its own.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gridreg_jax.transforms.interpolation import contract, hat_weights


def halve(volume: Float[Array, "N X Y Z C"]) -> Float[Array, "N x y z C"]:
    """Means of blocks of two voxels an axis: sizes `ceil(size / 2)`; in the unit of the volume.

    Source: Williams, Pyramidal parametrics, SIGGRAPH 1983, in three dimensions.
    """
    volume = jnp.pad(volume, [(0, 0)] + [(0, size % 2) for size in volume.shape[1:4]] + [(0, 0)], mode="edge")
    for axis in (1, 2, 3):
        shape = volume.shape
        volume = volume.reshape(*shape[:axis], shape[axis] // 2, 2, *shape[axis + 1 :]).mean(axis=axis + 1)
    return volume


def double(displacement: Float[Array, "N x y z 3"], shape: tuple[int, int, int]) -> Float[Array, "N X Y Z 3"]:
    """A displacement found on halved images, in voxels of the fine lattice `shape`; linear between the coarse voxels,
    constant beyond them.

    What is given is in coarse voxels. Source: linear interpolation at the places that `halve` gives the coarse voxels.
    """
    sizes = zip(shape, displacement.shape[1:4], strict=True)
    return 2 * contract(displacement, [hat_weights(coarse, (np.arange(size) - 0.5) / 2) for size, coarse in sizes])
