"""Register two images of any size, spacing and orientation: one call, and a result that warps, maps and saves."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Num

from gridreg_jax import geometry
from gridreg_jax.data import nifti
from gridreg_jax.data.nifti import Source, Volume
from gridreg_jax.data.preprocess import normalise, resample
from gridreg_jax.errors import InputError
from gridreg_jax.export import itk
from gridreg_jax.losses import SIMILARITIES
from gridreg_jax.registration import affine as affine_start
from gridreg_jax.registration import deformable
from gridreg_jax.registration.deformable import PRESETS, StageResult
from gridreg_jax.transforms.certificate import Certificate
from gridreg_jax.transforms.interpolation import interpolate
from gridreg_jax.transforms.warp import identity_grid, sample, warp_labels

# Voxels that are sampled at a time.
SLAB = 2_000_000
INVERSE_ITERATIONS = 20


@dataclasses.dataclass(frozen=True, eq=False)
class Registration:
    """The map `y = matrix (x + u(x))` from points of the fixed image to points of the moving image (RAS mm).

    Attributes:
      fixed, moving: the images, in their own intensities.
      matrix: RAS mm -> RAS mm, the affine part.
      control_grid: of u, a clamped cubic spline on the fixed lattice, in its voxels.
      certificate: what is proven about `x -> x + u(x)`.
      stages: what each stage of the deformable part did.
      fixed_working, moving_working: the images as they were compared, normalised, on their finest lattices.
    """

    fixed: Volume
    moving: Volume
    matrix: Float[np.ndarray, "4 4"]
    control_grid: Float[np.ndarray, "gx gy gz 3"]
    certificate: Certificate
    stages: tuple[StageResult, ...]
    fixed_working: Volume
    moving_working: Volume

    @functools.cached_property
    def displacement(self) -> Float32[np.ndarray, "X Y Z 3"]:
        """u at the voxels of the fixed lattice, in its voxels; the affine part is not in it."""
        return np.asarray(_dense(self.control_grid, self.fixed.array.shape))

    @functools.cached_property
    def displacement_mm(self) -> Float32[np.ndarray, "X Y Z 3"]:
        """The whole map, `y - x` at the voxels x of the fixed lattice: RAS mm."""
        linear = self.matrix @ self.fixed.affine - self.fixed.affine
        return np.asarray(_total(self.displacement, self.matrix[:3, :3] @ self.fixed.affine[:3, :3], linear[:3]))

    @property
    def transforms(self) -> list[itk.ItkTransform]:
        """The same map as ITK's composite transform: affine, then spline, of which the last is applied first."""
        spline = itk.bspline_transform(self.control_grid, self.fixed.array.shape, self.fixed.affine)
        return [itk.affine_transform(self.matrix), spline]

    def map_points(self, points_mm: Float[np.ndarray, "P 3"]) -> Float[np.ndarray, "P 3"]:
        """Where the map takes points of the fixed image: RAS mm -> RAS mm of the moving image.

        As in ITK, u is 0 farther than a cell beyond the fixed lattice.
        """
        return itk.apply(self.transforms, points_mm)

    def map_points_back(self, points_mm: Float[np.ndarray, "P 3"]) -> Float[np.ndarray, "P 3"]:
        """Where the inverse takes points of the moving image: RAS mm -> RAS mm of the fixed image."""
        spline = self.transforms[1:]
        straight = geometry.voxel_to_world(points_mm, np.linalg.inv(self.matrix))
        found = straight
        for _ in range(INVERSE_ITERATIONS):
            found = straight - (itk.apply(spline, found) - found)
        return found

    def warp(self, volume: Volume, *, labels: bool = False) -> Num[np.ndarray, "X Y Z"]:
        """A volume in the moving image's space, on the fixed lattice. Read once, from its own voxels.

        Args:
          volume: of any lattice.
          labels: int32, the label with the largest sum of linear weights, 0 outside; else linear, float32, the minimum
            of the volume outside.
        """
        matrix = np.linalg.inv(volume.affine) @ self.matrix @ self.fixed.affine
        return pull(volume, self.displacement, matrix, labels=labels)

    @functools.cached_property
    def _inverse(self) -> tuple[Float32[np.ndarray, "n m k 3"], float, float]:
        """w with `x = z + w(z)` for `z = x + u(x)`, on the working lattice in voxels of it, with its errors in mm."""
        shape = self.fixed_working.array.shape
        step = np.subtract(self.fixed.array.shape, 1) / np.subtract(shape, 1)
        u = _dense(self.control_grid / step, shape)
        w, error = _invert(u, geometry.spacing(self.fixed.affine) * step)
        error = np.asarray(error)
        return np.asarray(w), float(np.nanmean(error)), float(np.nanmax(error))

    @property
    def inverse_errors_mm(self) -> tuple[float, float]:
        """Mean and maximum over the working lattice of the distance from a voxel to where map and inverse take it.

        Voxels that the map takes off the lattice do not count: there is no inverse there. mm of the fixed image.
        """
        return self._inverse[1:]

    def inverse_displacement_mm(self) -> Float32[np.ndarray, "x y z 3"]:
        """The inverse of the whole map, `x - y` at the voxels y of the moving lattice: RAS mm.

        Where the inverse affine leads off the fixed lattice, u is taken for what it is at its border.
        """
        w = self._inverse[0]
        working = self.fixed_working.affine
        to_fixed = np.linalg.inv(self.matrix)
        to_working = np.linalg.inv(working) @ to_fixed @ self.moving.affine
        linear = (to_fixed @ self.moving.affine - self.moving.affine)[:3]
        result = np.empty((*self.moving.array.shape, 3), np.float32)
        for start, stop in _slabs(self.moving.array.shape):
            result[start:stop] = _inverse_slab(
                w, start, to_working[:3], linear, working[:3, :3], shape=(stop - start, *result.shape[1:3])
            )
        return result


def register(
    fixed: Source | Volume,
    moving: Source | Volume,
    *,
    preset: str = "balanced",
    affine: str | Path | Float[np.ndarray, "4 4"] = "auto",
    similarity: str = "lncc",
    grid: int | float | None = None,
    notify: Callable[[StageResult], None] = lambda result: None,
) -> Registration:
    """Find the map under which two images are most alike: affine, then a cubic control grid from coarse to fine.

    Args:
      fixed, moving: paths of NIfTI files, images of nibabel's, pairs of array and affine (voxel -> RAS mm), or volumes
        that `nifti.load_image` has read.
      preset: a name in `PRESETS`.
      affine: "auto" for an affine start, "rigid" for a rigid one, "off" for none (both images in one world space), a
        file of ITK's or ANTs' with an affine, or the matrix, RAS mm of the fixed -> RAS mm of the moving image.
      similarity: a name in `losses.SIMILARITIES`; "nmi" and "mind" are for different modalities.
      grid: control points an axis in the last stage (int), or the length of its cells in mm (float); None for auto.
      notify: takes the result of each stage.

    Raises:
      InputError: an image is not as it should be, the two do not overlap, or an argument is unknown.
    """
    for name, value, known in (("preset", preset, PRESETS), ("similarity", similarity, SIMILARITIES)):
        if value not in known:
            raise InputError(f"{name} {value!r} is not known: the known ones are {', '.join(known)}")
    matrix = given_affine(affine)
    with ThreadPoolExecutor(2) as pool:
        fixed, moving = pool.map(_loaded, (fixed, moving))
        fixed_working, moving_working = pool.map(_at_work, (fixed, moving))
    deformable.last_cells(fixed_working, PRESETS[preset], grid)  # A mistake is named before the long part.
    if matrix is None:
        kind = "rigid" if affine == "rigid" else "affine"
        start_similarity = "nmi" if similarity in ("nmi", "mind") else "ncc"
        matrix = affine_start.align(fixed_working, moving_working, kind=kind, similarity=start_similarity)
    else:
        affine_start.check_overlap(fixed, moving, matrix)
    control_grid, certificate, stages = deformable.deform(
        fixed_working,
        moving_working,
        matrix,
        preset=PRESETS[preset],
        similarity=similarity,
        grid=grid,
        notify=notify,
    )
    step = np.subtract(fixed.array.shape, 1) / np.subtract(fixed_working.array.shape, 1)
    return Registration(
        fixed, moving, matrix, control_grid * step, certificate, tuple(stages), fixed_working, moving_working
    )


def given_affine(affine: str | Path | Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"] | None:
    """The matrix (RAS mm -> RAS mm) that an argument stands for; None where it is to be found.

    Raises:
      InputError: a file that cannot be read or holds more than affine transforms.
    """
    if isinstance(affine, np.ndarray):
        return affine
    if affine in ("auto", "rigid"):
        return None
    if affine == "off":
        return np.eye(4)
    transforms = itk.read(affine)
    if not all(transform.type.startswith(("Affine", "MatrixOffset")) for transform in transforms):
        raise InputError(f"{affine}: holds more than an affine transform")
    # Four points tell an affine map.
    points = itk.apply(transforms, np.vstack([np.zeros(3), np.eye(3)]))
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = (points[1:] - points[0]).T, points[0]
    return matrix


def pull(
    volume: Volume,
    displacement: Float32[np.ndarray, "X Y Z 3"],
    matrix: Float[np.ndarray, "4 4"],
    *,
    labels: bool = False,
) -> Num[np.ndarray, "X Y Z"]:
    """`volume(matrix (x + displacement(x)))` at the voxels x of a lattice; outside and labels as `Registration.warp`.

    Args:
      volume: what is sampled.
      displacement: in voxels of the lattice.
      matrix: voxels of the lattice -> voxels of the volume.
    """
    result = np.empty(displacement.shape[:3], np.int32 if labels else np.float32)
    outside = 0 if labels else volume.array.min()
    for start, stop in _slabs(result.shape):
        result[start:stop] = _pull_slab(
            volume.array, displacement[start:stop], start, matrix[:3], outside, labels=labels
        )
    return result


def _slabs(shape: Sequence[int]) -> list[tuple[int, int]]:
    """First and last rows of slabs of one size, so that one program serves all; the last ones may overlap."""
    rows = min(shape[0], max(1, SLAB // (shape[1] * shape[2])))
    count = -(-shape[0] // rows)
    rows = -(-shape[0] // count)
    return [(min(i * rows, shape[0] - rows), min(i * rows, shape[0] - rows) + rows) for i in range(count)]


def _loaded(source: Source | Volume) -> Volume:
    return source if isinstance(source, Volume) else nifti.load_image(source)


def _at_work(volume: Volume) -> Volume:
    """Normalised, on the finest lattice that registration works on."""
    shape = deformable.finest_shape(volume)
    affine = affine_start.corner_to_corner(volume, shape)
    array = resample(dataclasses.replace(volume, array=normalise(volume.array)), affine, shape)
    return Volume(array, affine, volume.path)


def _linear(points: Float[Array, "X Y Z 3"], matrix) -> Float[Array, "X Y Z 3"]:
    return jnp.matmul(points, matrix[:, :3].T, precision=jax.lax.Precision.HIGHEST) + matrix[:, 3]


@functools.partial(jax.jit, static_argnames="shape")
def _dense(control_grid, shape):
    return interpolate(control_grid[None], shape, method="bspline")[0]


@jax.jit
def _total(displacement, linear, affine_part):
    moved = jnp.matmul(displacement, linear.T, precision=jax.lax.Precision.HIGHEST)
    return moved + _linear(identity_grid(displacement.shape[:3]), affine_part)


@functools.partial(jax.jit, static_argnames="labels")
def _pull_slab(array, displacement, start, matrix, outside, *, labels):
    lattice = identity_grid(displacement.shape[:3])
    points = _linear(lattice.at[..., 0].add(start) + displacement, matrix)
    size = jnp.asarray(array.shape, jnp.float32)
    # As far as the voxels reach; the margin keeps rounding from deciding about a voxel that lies on the very edge.
    inside = jnp.all(jnp.abs(points - (size - 1) / 2) <= size / 2 + 1e-3, axis=-1)
    if labels:
        values = warp_labels(array[None], (points - lattice)[None])[0]
    else:
        values = sample(array[..., None], points)[..., 0]
    return jnp.where(inside, values, outside)


@jax.jit
def _invert(u, spacing):
    shape = u.shape[:3]
    lattice = identity_grid(shape)
    w = jax.lax.fori_loop(0, INVERSE_ITERATIONS, lambda _, w: -sample(u, lattice + w), jnp.zeros_like(u))
    reached = lattice + u
    inside = jnp.all((reached >= 0) & (reached <= jnp.asarray(shape) - 1), axis=-1)
    error = jnp.linalg.norm((u + sample(w, reached)) * spacing, axis=-1)
    return w, jnp.where(inside, error, jnp.nan)


@functools.partial(jax.jit, static_argnames="shape")
def _inverse_slab(w, start, to_working, linear, working, *, shape):
    lattice = identity_grid(shape).at[..., 0].add(start)
    moved = jnp.matmul(sample(w, _linear(lattice, to_working)), working.T, precision=jax.lax.Precision.HIGHEST)
    return moved + _linear(lattice, linear)
