"""The embedded brain cohort: synthetic subjects of one anatomy, whose true correspondence is known.

The anatomy is the MNI152 T1 template with its grey- and white-matter maps, which the `nilearn` package ships. Subject s
is the anatomy A under a smooth diffeomorphic map: `image_s(x) = A(phi_s(x))`, where `phi_s(x) = x + u_s(x)` is the flow
of a random stationary velocity field, with its own contrast, bias field and noise. The point of subject j that
corresponds to the point x of subject i is therefore `phi_j^-1(phi_i(x))`, known to the tolerance of the inversion.
Everything is a pure function of (seed, subject index). Coordinates are voxels of the lattice unless named otherwise.
"""

import dataclasses
import functools

import numpy as np
from scipy import ndimage

from gridreg_jax.data.preprocess import Prepared, normalise
from gridreg_jax.errors import InputError
from gridreg_jax.rng import generator

# Part of every cache key: raise it with every change of what `subject` computes.
VERSION = 4
SHAPE = (80, 96, 80)
SPACING_MM = 2
LABELS = {1: "grey matter", 2: "white matter"}
LANDMARKS = 128
# The map is defined on every second voxel and interpolated linearly: it is smooth on a scale of 10 voxels.
_COARSE = 2


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """The template on the lattice: image in [0, 1], tissue labels, landmarks `[K, 3]` in voxels, affine to RAS mm."""

    image: np.ndarray
    labels: np.ndarray
    landmarks: np.ndarray
    affine: np.ndarray


@functools.lru_cache(maxsize=1)
def anatomy() -> Anatomy:
    """The skull-stripped MNI152 template at 2 mm, cropped to its brain.

    Raises:
      InputError: `nilearn` is not installed.
    """
    try:
        from nilearn import datasets
    except ImportError as error:
        raise InputError(
            "the embedded cohort needs the package nilearn: pip install 'gridreg_jax[cohort]', "
            "or give your own data with --config.data.pairs or --config.data.subjects"
        ) from error
    template = datasets.load_mni152_template(resolution=SPACING_MM)
    brain = datasets.load_mni152_brain_mask(resolution=SPACING_MM).get_fdata() > 0
    grey = datasets.load_mni152_gm_template(resolution=SPACING_MM).get_fdata()
    white = datasets.load_mni152_wm_template(resolution=SPACING_MM).get_fdata()
    found = np.argwhere(brain)
    start = (found.min(axis=0) + found.max(axis=0) + 1) // 2 - np.array(SHAPE) // 2

    def crop(array):
        padded = np.pad(array, [(n, n) for n in SHAPE])
        return padded[tuple(slice(s + n, s + 2 * n) for s, n in zip(start, SHAPE, strict=True))]

    labels = np.where(white > np.maximum(grey, 0.5), 2, np.where(grey > 0.5, 1, 0))
    mask = crop(brain)
    landmarks = generator(0, "landmarks").permutation(np.argwhere(ndimage.binary_erosion(mask, iterations=3)))
    affine = template.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ start
    return Anatomy(
        image=crop(template.get_fdata() * brain).astype(np.float32),
        labels=np.where(mask, crop(labels), 0).astype(np.int32),
        landmarks=landmarks[:LANDMARKS].astype(np.float64),
        affine=affine,
    )


@functools.lru_cache(maxsize=64)
def displacement(seed: int, index: int) -> np.ndarray:
    """Displacement u of subject `index` on every second voxel, `[3, x, y, z]` float64, in voxels.

    The largest vector is 6 to 10 mm long.
    """
    rng = generator(seed, "subject map", index)
    shape = [n // _COARSE + 1 for n in SHAPE]
    velocity = np.stack([ndimage.gaussian_filter(rng.standard_normal(shape), 5.0, mode="constant") for _ in range(3)])
    length_mm = np.linalg.norm(velocity, axis=0).max() * _COARSE * SPACING_MM
    velocity *= rng.uniform(6, 10) / length_mm  # in coarse voxels
    steps = 6
    field = velocity / 2**steps
    identity = np.indices(shape, dtype=np.float64)
    for _ in range(steps):
        field = field + _sample(field, identity + field)
    return field * _COARSE


def map_points(points: np.ndarray, seed: int, index: int) -> np.ndarray:
    """From a subject to the anatomy: `phi(x) = x + u(x)`, points `[..., 3]` in voxels."""
    u = displacement(seed, index)
    return points + np.moveaxis(_sample(u, np.moveaxis(points, -1, 0) / _COARSE), 0, -1)


def unmap_points(points: np.ndarray, seed: int, index: int, *, tolerance: float = 1e-4) -> np.ndarray:
    """From the anatomy to a subject: `phi^-1`, by fixed-point iteration until no point moves by `tolerance` voxels."""
    found = np.array(points, dtype=np.float64)
    for _ in range(200):
        update = points - (map_points(found, seed, index) - found)
        moved = np.abs(update - found).max()
        found = update
        if moved < tolerance:
            return found
    raise RuntimeError(f"the map of subject {index} (seed {seed}) was not inverted to {tolerance} voxels")


def true_displacement(fixed: int, moving: int, *, seed: int) -> np.ndarray:
    """The true displacement `[X, Y, Z, 3]` in voxels between two subjects: `phi_moving^-1(phi_fixed(x)) - x`."""
    grid = np.moveaxis(np.indices(SHAPE, dtype=np.float64), 0, -1)
    return unmap_points(map_points(grid, seed, fixed), seed, moving) - grid


def subject(index: int, *, seed: int) -> tuple[Prepared, np.ndarray]:
    """Image, tissue labels and affine of a subject, and its landmarks `[K, 3]` in voxels (same order in all)."""
    template = anatomy()
    rng = generator(seed, "subject appearance", index)
    grid = np.moveaxis(np.indices(SHAPE, dtype=np.float64), 0, -1)
    points = np.moveaxis(map_points(grid, seed, index), -1, 0)
    image = ndimage.map_coordinates(template.image, points, order=1, mode="nearest")
    image = image ** rng.uniform(0.9, 1.1)
    bias = ndimage.zoom(rng.standard_normal((4, 4, 4)), np.array(SHAPE) / 4, order=3)
    image = image * np.exp(0.07 * bias) + 0.02 * rng.standard_normal(SHAPE)
    labels = ndimage.map_coordinates(template.labels, points, order=0, mode="nearest")
    prepared = Prepared(
        image=normalise(np.maximum(image, 0).astype(np.float32)),
        known=np.ones(SHAPE, bool),
        above_zero=image > 0,
        labels=labels.astype(np.int32),
        affine=template.affine,
    )
    return prepared, unmap_points(template.landmarks, seed, index)


def _sample(field: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    """Linear values of a field `[3, x, y, z]` at coordinates `[3, ...]`, clamped at the border."""
    return np.stack([ndimage.map_coordinates(part, coordinates, order=1, mode="nearest") for part in field])
