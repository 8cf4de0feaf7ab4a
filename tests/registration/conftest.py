"""Images without voxels: sums of Gaussians in world space, seen on any lattice and through any map."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from gridreg_jax import geometry
from gridreg_jax.data.nifti import Volume


def turned(angle, axis):
    """Rotation matrix about an axis (0, 1, 2), degrees."""
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    matrix = np.eye(3)
    a, b = [other for other in range(3) if other != axis]
    matrix[[a, a, b, b], [a, b, a, b]] = c, -s, s, c
    return matrix


class Phantom:
    """A body of 100 mm around the origin with structures of some mm inside."""

    def __init__(self, seed=0, size_mm=100.0):
        rng = np.random.default_rng(seed)
        self.centers = rng.uniform(-0.3, 0.3, (60, 3)) * size_mm * [1.0, 1.2, 0.8]
        self.widths = rng.uniform(0.04, 0.09, 60) * size_mm
        self.heights = rng.uniform(-0.5, 1.0, 60)
        self.body_mm = 0.2 * size_mm

    def intensities(self, points_mm):
        values = 2 * np.exp(-0.5 * np.sum(points_mm**2, axis=-1) / self.body_mm**2)
        for center, width, height in zip(self.centers, self.widths, self.heights, strict=True):
            values += height * np.exp(-0.5 * np.sum((points_mm - center) ** 2, axis=-1) / width**2)
        return values

    def volume(self, shape, affine, through=lambda points_mm: points_mm):
        """The volume with value `intensities(through(x))` at every voxel x."""
        voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
        array = self.intensities(through(geometry.voxel_to_world(voxels, affine)))
        return Volume(array.astype(np.float32), affine, Path("phantom"))


@pytest.fixture(scope="session")
def phantom():
    """The class `Phantom`."""
    return Phantom


@pytest.fixture(scope="session")
def lattice():
    """`lattice(shape, spacing, rotation, centre)`: an affine whose lattice has its middle at `centre` (mm)."""

    def make(shape, spacing, rotation, centre=(0, 0, 0)):
        linear = rotation * np.asarray(spacing, float)
        return nib.affines.from_matvec(linear, centre - linear @ (np.subtract(shape, 1) / 2))

    return make


@pytest.fixture(scope="session")
def turn():
    """The function `turned`."""
    return turned
