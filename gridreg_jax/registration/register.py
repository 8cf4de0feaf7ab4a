"""Register two images of any size, spacing and orientation: one call, and a result that warps, maps and saves."""

import contextlib
import dataclasses
import functools
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Num
from numpy.typing import ArrayLike

from gridreg_jax import geometry, instance, programs
from gridreg_jax.data import nifti
from gridreg_jax.data.nifti import Source, Volume, corner_to_corner
from gridreg_jax.data.preprocess import field_of_view, normalise, resample
from gridreg_jax.errors import InputError, check_known
from gridreg_jax.export import itk, itk_files
from gridreg_jax.export.inverse import points_back
from gridreg_jax.programs import stored
from gridreg_jax.registration import affine as affine_start
from gridreg_jax.registration import deformable
from gridreg_jax.registration.deformable import PENALTY_SCALE, PRESETS, StageResult, Start
from gridreg_jax.registration.mask import kept
from gridreg_jax.transforms.affine import apply_affine
from gridreg_jax.transforms.certificate import Certificate
from gridreg_jax.transforms.interpolation import interpolate
from gridreg_jax.transforms.warp import identity_grid, invert, sample, warp_labels

# Voxels that are sampled at a time.
SLAB = 2_000_000
# Of the coarse search for the inverse, and the share of each step that is taken. Whole steps diverge where u stretches
# most.
INVERSE_ITERATIONS, RELAXATION = 12, 0.7
# Of its end on the moving lattice, where large images have little time: voxels times iterations; at least and at most
# so many of these. They cannot go far astray, and are to bring most of it.
FINISHING_VOXELS, FINISHING_ITERATIONS, FINISHING_RELAXATION = 20_000_000, (2, 10), 0.9
# Of the dense inverse, and of u for it, unless the images have more: between voxels both are taken as linear.
INVERSE_VOXELS = 2_200_000
METHODS = (*instance.METHODS, "ncf")
# Voxels of the finest lattice that a mask has to leave: fewer say nothing.
LEAST_MASK = 100


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
      sigma_mm: where a Bayesian network began, its standard deviation of the displacement, on the lattice of
        `fixed_working`; else None.
      flow_error_mm: where the stages fitted a velocity, how far (root mean square) the control grid is from its flow;
        else None.
      seconds: what the affine start or the network ("start") and the deformable part ("deformation") took.
    """

    fixed: Volume
    moving: Volume
    matrix: Float[np.ndarray, "4 4"]
    control_grid: Float[np.ndarray, "gx gy gz 3"]
    certificate: Certificate
    stages: tuple[StageResult, ...]
    fixed_working: Volume
    moving_working: Volume
    sigma_mm: Float32[np.ndarray, "x y z"] | None
    flow_error_mm: float | None
    seconds: dict[str, float]

    @functools.cached_property
    def displacement(self) -> Float32[np.ndarray, "X Y Z 3"]:
        """u at the voxels of the fixed lattice, in its voxels; the affine part is not in it."""
        return np.asarray(_dense(self.control_grid, shape=self.fixed.array.shape))

    @functools.cached_property
    def displacement_mm(self) -> Float32[np.ndarray, "X Y Z 3"]:
        """The whole map, `y - x` at the voxels x of the fixed lattice: RAS mm."""
        linear = self.matrix @ self.fixed.affine - self.fixed.affine
        return np.asarray(_total(self.displacement, self.matrix[:3, :3] @ self.fixed.affine[:3, :3], linear[:3]))

    @property
    def learn2reg_displacement(self) -> Float32[np.ndarray, "x y z 3"]:
        """The whole map as Learn2Reg reads it: what takes a voxel of the fixed file to its place in the moving file.

        In voxels; axes and components as the files have them.

        Source: the evaluation code of Learn2Reg (Hering et al., IEEE TMI 2023), which warps by such a field.
        """
        displacement_mm, affine = nifti.as_stored(self.displacement_mm, self.fixed)
        voxels = np.moveaxis(np.indices(displacement_mm.shape[:3]), 0, -1)
        _, moving_affine = nifti.as_stored(self.moving.array, self.moving)
        reached_mm = geometry.voxel_to_world(voxels, affine) + displacement_mm
        return (geometry.world_to_voxel(reached_mm, moving_affine) - voxels).astype(np.float32)

    @functools.cached_property
    def working_displacement(self) -> Float32[np.ndarray, "x y z 3"]:
        """u at the voxels of the working lattice, in its voxels."""
        shape = self.fixed_working.array.shape
        step = np.subtract(self.fixed.array.shape, 1) / np.subtract(shape, 1)
        return np.asarray(_dense((self.control_grid / step).astype(np.float32), shape=shape))

    @property
    def transforms(self) -> list[itk.ItkTransform]:
        """The same map as ITK's composite transform: affine, then spline, of which the last is applied first."""
        spline = itk.bspline_transform(self.control_grid, self.fixed.array.shape, self.fixed.affine)
        return [itk.affine_transform(self.matrix), spline]

    def map_points(self, points_mm: ArrayLike) -> Float[np.ndarray, "P 3"]:
        """Where the map takes points `[P, 3]` of the fixed image: RAS mm -> RAS mm of the moving image.

        As in ITK, u is 0 farther than a cell beyond the fixed lattice.

        Raises:
          InputError: another shape than (P, 3).
        """
        return itk.apply(self.transforms, _checked_points(points_mm))

    def map_points_back(self, points_mm: ArrayLike) -> Float[np.ndarray, "P 3"]:
        """Where the inverse takes points `[P, 3]` of the moving image: RAS mm -> RAS mm of the fixed image.

        Raises:
          InputError: another shape than (P, 3).
        """
        return points_back(self.transforms, _checked_points(points_mm))

    def warp(self, volume: Source | Volume, *, labels: bool = False) -> Num[np.ndarray, "x y z"]:
        """A volume in the moving image's space, on the fixed lattice. Read once, from its own voxels.

        Args:
          volume: of any lattice; what `register` takes.
          labels: int32, the label with the largest sum of linear weights, 0 outside; else linear, float32, the minimum
            of the volume outside.

        Returns:
          Its axes are those of the fixed image as it was given, where all other arrays here are in RAS order.

        Raises:
          InputError: the volume is not as it should be.
        """
        if not isinstance(volume, Volume):
            load = nifti.load_labels if labels else functools.partial(nifti.load_image, constant=True)
            volume = load(volume, placed=True)
        return nifti.as_stored(self.on_fixed(volume, labels=labels), self.fixed)[0]

    def on_fixed(self, volume: Volume, *, labels: bool = False) -> Num[np.ndarray, "X Y Z"]:
        """As `warp`, in RAS order."""
        matrix = np.linalg.inv(volume.affine) @ self.matrix @ self.fixed.affine
        return pull(volume, self.displacement, matrix, labels=labels)

    @property
    def inverse_shape(self) -> tuple[int, int, int]:
        """Of the lattice of the dense inverse, whose corners are those of the moving lattice: as many voxels, or more
        where these are few."""
        return _cut(self.moving)

    @functools.cached_property
    def inverse_displacement_mm(self) -> Float32[np.ndarray, "X Y Z 3"]:
        """The inverse of the whole map, `x - y` at the voxels y of a lattice of `inverse_shape`: RAS mm.

        Where the inverse affine leads off the fixed lattice, u is taken for what it is at its border.
        """
        shape = self.inverse_shape
        affine = corner_to_corner(self.moving, shape)
        u, u_shape = self.displacement, _cut(self.fixed)
        u_affine = corner_to_corner(self.fixed, u_shape)
        if u.shape[:3] != u_shape:
            finer = geometry.spacing(self.fixed.affine) / geometry.spacing(u_affine)
            u = np.asarray(_dense((self.control_grid * finer).astype(np.float32), shape=u_shape))
        step = np.subtract(u.shape[:3], 1) / np.subtract(self.fixed_working.array.shape, 1)
        # Almost found on the coarser lattice, and finished on the finer one.
        coarse = _invert(self.working_displacement)
        to_fixed = np.linalg.inv(self.matrix) @ affine
        to_voxels, linear = np.linalg.inv(u_affine) @ to_fixed, to_fixed - affine
        result = np.empty((*shape, 3), np.float32)
        iterations = int(np.clip(FINISHING_VOXELS // np.prod(shape), *FINISHING_ITERATIONS))
        for start, stop in _slabs(shape):
            result[start:stop] = _inverse_slab(
                coarse,
                u,
                step.astype(np.float32),
                start,
                to_voxels[:3],
                linear[:3],
                u_affine[:3, :3],
                shape=(stop - start, *result.shape[1:3]),
                iterations=iterations,
            )
        return result

    @functools.cached_property
    def inverse_errors_mm(self) -> tuple[float, float]:
        """Mean and maximum, over the working lattice, of the distance from a point to where map and inverse take it.

        The inverse is the dense one, interpolated. Points that the map takes off the moving lattice do not count; NaN
        where there are no others.
        """
        working = self.fixed_working.affine
        to_inverse = np.linalg.inv(corner_to_corner(self.moving, self.inverse_shape)) @ self.matrix
        error = np.asarray(
            _inverse_error(
                self.working_displacement,
                self.inverse_displacement_mm,
                (to_inverse @ working)[:3],
                (self.matrix @ working - working)[:3],
                self.matrix[:3, :3] @ working[:3, :3],
            )
        )
        error = error[~np.isnan(error)]
        return (float(error.mean()), float(error.max())) if error.size else (np.nan, np.nan)


def register(
    fixed: Source | Volume,
    moving: Source | Volume,
    *,
    preset: str = "balanced",
    affine: str | Path | Num[np.ndarray, "_ _"] = "auto",
    similarity: str = "lncc",
    grid: int | float | np.integer | None = None,
    mask: Source | Volume | None = None,
    method: str = "grid",
    model: str | Path | None = None,
    refine: int | None = None,
    notify: Callable[[StageResult], None] = lambda result: None,
) -> Registration:
    """Find the map under which two images are most alike: affine, then a cubic control grid from coarse to fine.

    Or a network proposes the map, trained before (`model`) or fitted to the pair (`method="ncf"`); a control grid takes
    it up, which the preset's stages with the last grid may refine.

    Args:
      fixed, moving: paths of NIfTI files, such images of nibabel's, pairs of array and affine (voxel -> RAS mm), or
        volumes that `nifti.load_image` has read.
      preset: a name in `PRESETS`.
      affine: "auto" for an affine start, "rigid" for a rigid one, "off" for none (both images in one world space), a
        file of ITK's or ANTs' with an affine, or the 4 x 4 matrix, RAS mm of the fixed -> RAS mm of the moving image.
      similarity: a name in `deformable.PENALTY_SCALE`; "nmi" and "mind" are for different modalities.
      grid: control points an axis in the last stage (int), or the length of its cells in mm (float); None for auto.
      mask: labels on the lattice of the fixed image: what is 0 there does not guide the registration.
      method: what the preset's stages fit: "grid", displacements of control points; "velocity", a stationary velocity,
        whose flow a control grid takes up; "symmetric", the same, with the similarity measured both ways. Or "ncf", a
        neural correspondence field, in place of the stages.
      model: folder of a run of `train.py`; its network takes the place of the affine start and of the first stages.
      refine: steps that follow the network; None: none with "ncf", else as the run's config says (`refinement.steps`).
      notify: takes the result of each stage.

    Raises:
      InputError: an image is not as it should be, the two do not overlap, or an argument is unknown.
    """
    _check_arguments(preset, affine, similarity, grid, method, model, refine)
    matrix = given_affine(affine)
    grid = int(grid) if isinstance(grid, np.integer) else grid
    programs.keep()
    with ThreadPoolExecutor(2) as pool:
        fixed, moving = pool.map(_loaded, (fixed, moving), (3, 2))
        # Every one of the many steps of ncf is on the finest lattice: it gets the smallest.
        at_work = functools.partial(_at_work, voxels=PRESETS["fast" if method == "ncf" else preset].voxels)
        fixed_working, moving_working = pool.map(at_work, (fixed, moving))
    mask = mask if mask is None or isinstance(mask, Volume) else nifti.load_labels(mask, like=fixed)
    if mask is not None:
        left = kept(mask, fixed_working.affine, fixed_working.array.shape)
        _check_mask(mask, left, "the mask leaves")
    stages = PRESETS[preset]
    deformable.last_cells(fixed_working, stages, grid)  # A mistake is named before the long part.
    options = dict(similarity=similarity, grid=grid, method="grid" if method == "ncf" else method)
    trained = None if model is None else _trained(model)
    if trained is not None and refine is None:
        refine = trained.config["refinement"]["steps"]
    from_network = trained is not None or method == "ncf"
    if from_network:
        stages = deformable.refining(stages, refine or 0)
    begun, stop = time.monotonic(), threading.Event()
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as ending:
        ending.callback(stop.set)  # An error does not wait for programs that nobody will run.
        # The next part's programs are brought while this one runs.
        expected = dict(from_start=from_network, labels=getattr(trained.model, "labels", 0) if trained else 0)
        loading = pool.submit(
            deformable.load, fixed_working, preset=stages, stopped=stop.is_set, **expected, **options
        )
        if trained is not None:
            start = _start_by_network(trained, model, fixed, moving, fixed_working)
        else:
            start = _start_by_affine(fixed_working, moving_working, mask, affine, matrix)
        affine_start.check_overlap(fixed, moving, start.matrix)
        if mask is not None:
            shown = field_of_view(moving, start.matrix @ fixed_working.affine, left.shape)
            _check_mask(mask, left & shown, f"of what the mask leaves {moving.path} shows")
        if method == "ncf":
            start = _start_by_ncf(fixed_working, moving_working, mask, start)
        loading.result()
    seconds = {"start": time.monotonic() - begun}
    control_grid, certificate, results, flow_error_mm = deformable.deform(
        fixed_working,
        moving_working,
        start.matrix,
        preset=stages,
        mask=mask,
        start=start.displacement,
        label_maps=start.label_maps,
        notify=notify,
        **options,
    )
    seconds["deformation"] = time.monotonic() - begun - seconds["start"]
    step = np.subtract(fixed.array.shape, 1) / np.subtract(fixed_working.array.shape, 1)
    return Registration(
        fixed=fixed,
        moving=moving,
        matrix=start.matrix,
        control_grid=control_grid * step,
        certificate=certificate,
        stages=tuple(results),
        fixed_working=fixed_working,
        moving_working=moving_working,
        sigma_mm=start.sigma_mm,
        flow_error_mm=flow_error_mm,
        seconds=seconds,
    )


# What belongs to networks is imported where they are used: most registrations have none.


def _trained(model: str | Path):
    from gridreg_jax.training.trained import load_trained

    return load_trained(model, notify=warnings.warn)


def _start_by_affine(fixed: Volume, moving: Volume, mask: Volume | None, affine, given) -> Start:
    """The affine part that was given, or else the one that is sought."""
    if given is None:
        given = affine_start.align(fixed, moving, mask, kind="rigid" if affine == "rigid" else "affine")
    return Start(given)


def _start_by_network(trained, model: str | Path, fixed: Volume, moving: Volume, like: Volume) -> Start:
    """What a trained network proposes, on a lattice."""
    from gridreg_jax.registration.network import propose
    from gridreg_jax.training.trained import in_use

    with in_use(model):
        return propose(trained, fixed, moving, like)


def _start_by_ncf(fixed: Volume, moving: Volume, mask: Volume | None, start: Start) -> Start:
    """With what a network adds that is fitted to the two images."""
    from gridreg_jax.registration.network import fit_ncf

    return dataclasses.replace(start, displacement=fit_ncf(fixed, moving, start.matrix, mask))


def _check_arguments(preset, affine, similarity, grid, method, model, refine) -> None:
    """Raise `InputError` for an unknown name, a number that is none, or two arguments that contradict each other."""
    names = (("preset", preset, PRESETS), ("similarity", similarity, PENALTY_SCALE), ("method", method, METHODS))
    for name, value, known in names:
        check_known(name, value, known)
    if method != "grid" and model is not None:
        raise InputError("a model takes the place of the method: leave out one of the two")
    if refine is not None and ((model is None and method != "ncf") or refine < 0):
        raise InputError(f"refine, {refine}, is a number of steps from 0 that follow a network: give a model or ncf")
    if model is not None and not (isinstance(affine, str) and affine == "auto"):
        raise InputError("a model brings its own alignment: leave affine at 'auto'")
    if not (grid is None or isinstance(grid, (int, float, np.integer))):
        raise InputError(f"grid is {grid!r}: give points an axis (10), a length of cells in mm (5.0), or None")


def _check_mask(mask: Volume, left: Bool[np.ndarray, "X Y Z"], what: str) -> None:
    if (voxels := np.count_nonzero(left)) < LEAST_MASK:
        raise InputError(f"{mask.path}: {what} {voxels} voxels, and at least {LEAST_MASK} are needed")


def _checked_points(points_mm: ArrayLike) -> Float[np.ndarray, "P 3"]:
    points_mm = np.asarray(points_mm, np.float64)
    if points_mm.ndim != 2 or points_mm.shape[1] != 3:
        raise InputError(f"points are an array of shape (P, 3), a row of x, y, z in RAS mm each, not {points_mm.shape}")
    return points_mm


def given_affine(affine: str | Path | Num[np.ndarray, "_ _"]) -> Float[np.ndarray, "4 4"] | None:
    """The matrix (RAS mm -> RAS mm) that an argument stands for; None where it is to be found.

    Raises:
      InputError: a file that cannot be read or holds more than affine transforms, or a matrix that is not affine or
        cannot be inverted.
    """
    if not isinstance(affine, (str, Path)):
        matrix = np.asarray(affine, np.float64)
        whole = matrix.shape == (4, 4) and np.isfinite(matrix).all() and (matrix[3] == [0, 0, 0, 1]).all()
        if not (whole and abs(np.linalg.det(matrix[:3, :3])) > 1e-6):
            raise InputError(f"affine: no 4 x 4 matrix of an affine map that can be inverted: {matrix.tolist()}")
        return matrix
    if affine in ("auto", "rigid"):
        return None
    if affine == "off":
        return np.eye(4)
    if not Path(affine).exists():
        raise InputError(f"affine is {str(affine)!r}: give auto, rigid, off, or a file that exists")
    transforms = itk_files.read(affine)
    if any(transform.type != itk.AFFINE for transform in transforms):
        raise InputError(f"{affine}: holds more than an affine transform")
    return itk.affine_matrix(transforms)


def pull(
    volume: Volume,
    displacement: Float32[np.ndarray, "X Y Z 3"],
    matrix: Float[np.ndarray, "4 4"],
    *,
    labels: bool = False,
    outside: float | None = None,
    anywhere: bool = False,
) -> Num[np.ndarray, "X Y Z"]:
    """`volume(matrix (x + displacement(x)))` at the voxels x of a lattice; outside and labels as `Registration.warp`.

    Args:
      volume: what is sampled.
      displacement: in voxels of the lattice.
      matrix: voxels of the lattice -> voxels of the volume.
      outside: the value there, in place of the minimum.
      anywhere: whether the map may lead nowhere into the volume; if not, a warning says so.
    """
    result, reached = np.empty(displacement.shape[:3], np.int32 if labels else np.float32), False
    outside = 0 if labels else volume.array.min() if outside is None else np.float32(outside)
    for start, stop in _slabs(result.shape):
        result[start:stop], inside = _pull_slab(
            volume.array, displacement[start:stop], start, matrix[:3], outside, labels=labels
        )
        reached |= bool(inside)
    if not (reached or anywhere):
        warnings.warn(f"{volume.path}: the map leads nowhere into it: all of the result lies outside", stacklevel=2)
    return result


def _slabs(shape: Sequence[int]) -> list[tuple[int, int]]:
    """First and last rows of slabs of one size, so that one program serves all; the last ones may overlap."""
    rows = min(shape[0], max(1, SLAB // (shape[1] * shape[2])))
    count = -(-shape[0] // rows)
    rows = -(-shape[0] // count)
    return [(min(i * rows, shape[0] - rows), min(i * rows, shape[0] - rows) + rows) for i in range(count)]


def _loaded(source: Source | Volume, least: int) -> Volume:
    volume = source if isinstance(source, Volume) else nifti.load_image(source, placed=True)
    if min(volume.array.shape) < least:
        raise InputError(f"{volume.path}: registration needs at least {least} voxels an axis, not {volume.array.shape}")
    nifti.check_right_angles(volume)
    return volume


def _at_work(volume: Volume, voxels: int) -> Volume:
    """Normalised, on the finest lattice that registration works on, of about so many voxels.

    What is dark or bright in one field of view need not be so in another: most of it is kept.
    """
    shape = deformable.finest_shape(volume, voxels)
    affine = corner_to_corner(volume, shape)
    array = resample(dataclasses.replace(volume, array=normalise(volume.array, beyond=1.0)), affine, shape)
    return Volume(array, affine, volume.path)


def _linear(points: Float[Array, "X Y Z 3"], matrix) -> Float[Array, "X Y Z 3"]:
    return apply_affine(points, matrix[:, :3], matrix[:, 3])


@functools.partial(stored, static_argnames=("shape",))
def _dense(control_grid, *, shape):
    return interpolate(control_grid[None], shape, method="bspline")[0]


@stored
def _total(displacement, linear, affine_part):
    return apply_affine(displacement, linear) + _linear(identity_grid(displacement.shape[:3]), affine_part)


@functools.partial(stored, static_argnames=("labels",))
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
    return jnp.where(inside, values, outside), inside.any()


def _cut(volume: Volume) -> tuple[int, int, int]:
    """Shape of a volume's lattice with its voxels cut into equal parts, the longest sides first, as far as half the
    shortest side and `INVERSE_VOXELS`."""
    cells, spacing = np.subtract(volume.array.shape, 1), geometry.spacing(volume.affine)
    parts = np.ones(3, int)
    while (spacing / parts).max() > 0.501 * spacing.min():  # a little more than half, for rounding
        more = parts + (np.arange(3) == np.argmax(spacing / parts))
        if np.prod(cells * more + 1) > INVERSE_VOXELS:
            break
        parts = more
    return tuple(int(n) for n in cells * parts + 1)


@stored
def _invert(u):
    lattice = identity_grid(u.shape[:3])[None]
    return invert(u[None], lattice, 0 * lattice, iterations=INVERSE_ITERATIONS, relaxation=RELAXATION)[0]


@functools.partial(stored, static_argnames=("shape", "iterations"))
def _inverse_slab(coarse, u, step, start, to_voxels, linear, fixed, *, shape, iterations):
    """The inverse map's displacement (mm) at some rows of the moving lattice.

    Args:
      coarse: the inverse of u on the working lattice, in its voxels; `step` of those of u are one.
    """
    lattice = identity_grid(shape).at[..., 0].add(start)
    points = _linear(lattice, to_voxels)
    start = sample(coarse, points / step) * step
    options = dict(iterations=iterations, relaxation=FINISHING_RELAXATION)
    w = invert(u[None], points[None], start[None], **options)[0]
    return apply_affine(w, fixed) + _linear(lattice, linear)


@stored
def _inverse_error(u, inverse_mm, to_moving, linear, scale):
    """How far from each voxel of a lattice the map and its dense inverse lead (mm), NaN where there is no inverse."""
    lattice = identity_grid(u.shape[:3])
    reached = _linear(lattice + u, to_moving)
    there = _linear(lattice, linear) + apply_affine(u, scale)
    error = jnp.linalg.norm(there + sample(inverse_mm, reached), axis=-1)
    inside = jnp.all((reached >= 0) & (reached <= jnp.asarray(inverse_mm.shape[:3]) - 1), axis=-1)
    return jnp.where(inside, error, jnp.nan)
