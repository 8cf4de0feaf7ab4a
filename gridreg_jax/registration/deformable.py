"""The deformable part: cubic control grids that become finer from stage to stage, fitted to the two images.

A stage works on a lattice with the fixed image's axes, from the centre of its first to that of its last voxel along
each of them. So control grids of all stages span one box, and go from lattice to lattice by a change of unit alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float
from scipy import ndimage

from gridreg_jax import geometry
from gridreg_jax.data.nifti import Volume
from gridreg_jax.data.preprocess import resample
from gridreg_jax.errors import InputError
from gridreg_jax.instance import refine_recorded
from gridreg_jax.registration.affine import corner_to_corner
from gridreg_jax.transforms import bspline
from gridreg_jax.transforms.certificate import Certificate, certify

# Voxels of the finest lattice: 2 mm for a brain of 1 mm.
BUDGET = 750_000
# Voxels of the stage's lattice, the largest change of a control point in a step.
LEARNING_RATE = 0.25
# Up to two stages more with these weights, until the map is proven to be invertible.
FOLDING = (1e2, 1e4)
MENDING_STEPS = 10
# Then control points around what is still not proven are smoothed, at most so often.
SMOOTHINGS = 50
# How much smaller the differences of each similarity are than those of lncc: its bending weights scale with it.
BENDING_SCALE = {"lncc": 1.0, "ncc": 0.3, "nmi": 0.2, "mind": 0.1, "mse": 0.1}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A number of steps with one control grid on one lattice.

    Attributes:
      coarsening: spacing of the lattice, in the smallest of the finest lattice.
      halvings: how often the cells of this stage are halved until the last stage.
      steps: of gradient descent.
      bending: weight of the bending energy, per squared voxel of the stage's lattice.
    """

    coarsening: int
    halvings: int
    steps: int
    bending: float


@dataclasses.dataclass(frozen=True)
class Preset:
    """Stages, and the length of a cell of the last one, in voxels of the finest lattice."""

    cell: float
    stages: tuple[Stage, ...]


PRESETS = {
    "fast": Preset(5.0, (Stage(2, 2, 20, 3.0), Stage(2, 1, 20, 3.0), Stage(2, 0, 20, 2.0))),
    "balanced": Preset(4.0, (Stage(2, 2, 25, 2.0), Stage(2, 1, 25, 2.0), Stage(2, 0, 25, 1.0), Stage(1, 0, 15, 1.0))),
    "accurate": Preset(
        2.5,
        (Stage(2, 3, 30, 2.0), Stage(2, 2, 30, 2.0), Stage(2, 1, 40, 1.0), Stage(1, 1, 20, 1.0), Stage(1, 0, 50, 1.0)),
    ),
}


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage did.

    Attributes:
      grid_size: control points an axis.
      shape: voxels of the lattice.
      similarity: before each step.
    """

    grid_size: tuple[int, int, int]
    shape: tuple[int, int, int]
    similarity: tuple[float, ...]


def finest_shape(fixed: Volume) -> tuple[int, int, int]:
    """Voxels an axis of the finest lattice for a fixed image.

    Isotropic where the image is fine enough, nowhere finer than the image, and not many more voxels than `BUDGET`.
    Sides shorter than the image's are multiples of 8, so that images of about one size share compiled programs.
    """
    shape, spacing = np.array(fixed.array.shape), geometry.spacing(fixed.affine)
    step = spacing.min()
    while np.prod(size := np.minimum(shape, (shape - 1) * spacing / step + 1)) > BUDGET:
        step *= 1.02
    return tuple(int(n) for n in np.where(size < shape, np.minimum(shape, np.maximum(8, 8 * np.rint(size / 8))), shape))


def deform(
    fixed: Volume,
    moving: Volume,
    matrix: Float[np.ndarray, "4 4"],
    *,
    preset: Preset,
    similarity: str = "lncc",
    grid: int | float | None = None,
    notify: Callable[[StageResult], None] = lambda result: None,
) -> tuple[Float[np.ndarray, "gx gy gz 3"], Certificate, list[StageResult]]:
    """The control grid u for which `moving(matrix(x + u(x)))` is most like `fixed(x)`.

    Args:
      fixed: normalised, on its finest lattice (`finest_shape`).
      moving: normalised, on any lattice.
      matrix: RAS mm of the fixed image -> RAS mm of the moving image.
      preset: the stages.
      similarity: a name in `losses.SIMILARITIES`.
      grid: for the last stage, the number of control points an axis (int), or the length of a cell in mm (float);
        None for the preset's.
      notify: takes the result of each stage when it ends.

    Returns:
      The control grid in voxels of `fixed`; what is proven about it; what each stage did. Where the map is not proven
      to be invertible, further stages with a penalty on folding follow, and then control points are smoothed; the
      certificate says whether that was enough.

    Raises:
      InputError: a control grid that is too coarse or too fine for the image.
    """
    cells = last_cells(fixed, preset, grid)
    stages = list(preset.stages)
    control_grid, results, shape_before = None, [], None
    images = {stage.coarsening: _pair(fixed, moving, matrix, stage.coarsening) for stage in stages}
    for stage in stages:
        control_grid, shape_before, result = _run(
            control_grid, shape_before, images, stage, cells, similarity=similarity, folding=None
        )
        results.append(result)
        notify(result)
    certificate = certify(control_grid, shape_before)
    for folding in FOLDING:
        if certificate.invertible:
            break
        mending = dataclasses.replace(stages[-1], steps=MENDING_STEPS)
        control_grid, shape_before, result = _run(
            control_grid, shape_before, images, mending, cells, similarity=similarity, folding=folding
        )
        results.append(result)
        notify(result)
        certificate = certify(control_grid, shape_before)
    for _ in range(SMOOTHINGS):
        if certificate.invertible:
            break
        control_grid = _smoothed(control_grid, certificate.cells)
        certificate = certify(control_grid, shape_before)
    return _rescaled(control_grid, shape_before, fixed.array.shape), certificate, results


def last_cells(fixed: Volume, preset: Preset, grid: int | float | None) -> Sequence[int]:
    """Cells an axis of the last control grid. Arguments and errors as for `deform`."""
    shape, spacing = np.array(fixed.array.shape), geometry.spacing(fixed.affine)
    if min(shape) < 2:
        raise InputError(f"{fixed.path}: registration needs at least 2 voxels an axis, not {fixed.array.shape}")
    if isinstance(grid, int):
        if not 4 <= grid <= max(shape) + 3:
            raise InputError(f"a control grid has from 4 to {max(shape) + 3} points an axis here, not {grid}")
        return [min(grid - 3, int(size) - 1) for size in shape]
    if grid is not None and grid < spacing.min():
        raise InputError(f"cells of {grid:g} mm are smaller than a voxel of the lattice, {spacing.min():.3g} mm")
    length = preset.cell * spacing.min() if grid is None else grid
    cells = []
    for size, step in zip(shape, spacing, strict=True):
        # Whole numbers of the first stage's cells, so that halving is exact; no cell of less than two voxels.
        halvings = max(stage.halvings for stage in preset.stages)
        first = max(1, round((size - 1) * step / (length * 2**halvings)))
        while halvings and first * 2**halvings * 2 > size - 1:
            halvings -= 1
        cells.append(first * 2**halvings)
    return cells


def _pair(fixed: Volume, moving: Volume, matrix, coarsening: int):
    """Fixed image, moving image and where the moving one is known, on the lattice of a stage."""
    size, spacing = np.array(fixed.array.shape), geometry.spacing(fixed.affine)
    # Thick slices stay until the others are as thick.
    ratio = np.maximum(1, np.rint(coarsening * spacing.min() / spacing))
    shape = tuple(int(n) for n in np.maximum(np.minimum(4, size), np.rint(size / ratio)))
    affine = corner_to_corner(fixed, shape)
    everywhere = Volume(np.ones(moving.array.shape, np.int32), moving.affine, moving.path)
    return (
        resample(fixed, affine, shape)[None, ..., None],
        resample(moving, matrix @ affine, shape)[None, ..., None],
        resample(everywhere, matrix @ affine, shape, labels=True)[None],
    )


def _run(control_grid, shape_before, images, stage: Stage, cells: Sequence[int], *, similarity: str, folding):
    fixed, moving, mask = images[stage.coarsening]
    shape = fixed.shape[1:4]
    grid_size = tuple(-(-c // 2**stage.halvings) + 3 for c in cells)
    if control_grid is None:
        control_grid = np.zeros((*grid_size, 3), np.float32)
    else:
        control_grid = _rescaled(control_grid, shape_before, shape)
        if control_grid.shape[:3] != grid_size:
            control_grid = np.asarray(_halved(control_grid[None], grid_size)[0])[0]
    found, history = _fit(
        control_grid[None],
        fixed,
        moving,
        mask,
        stage.bending * BENDING_SCALE[similarity],
        folding,
        steps=stage.steps,
        similarity=similarity,
    )
    values = tuple(float(value) for value in np.asarray(history)[:, 0])
    return np.asarray(found)[0], shape, StageResult(grid_size, shape, values)


_halved = jax.jit(bspline.refine, static_argnums=1)


@functools.partial(jax.jit, static_argnames=("steps", "similarity"))
def _fit(control_grid, fixed, moving, mask, bending, folding, *, steps, similarity):
    return refine_recorded(
        control_grid,
        fixed,
        moving,
        steps=steps,
        bending=bending,
        learning_rate=LEARNING_RATE,
        interpolator="bspline",
        similarity=similarity,
        mask=mask,
        folding=folding,
    )


def _smoothed(control_grid, cells) -> Float[np.ndarray, "gx gy gz 3"]:
    """Means of 27 neighbours in place of the control points on which some cells depend."""
    near = np.zeros(control_grid.shape[:3], bool)
    for i, j, k in cells:
        near[i : i + 4, j : j + 4, k : k + 4] = True
    means = ndimage.uniform_filter(control_grid, (3, 3, 3, 1), mode="nearest")
    return np.where(near[..., None], (control_grid + means) / 2, control_grid)


def _rescaled(control_grid, shape_before, shape) -> Float[np.ndarray, "gx gy gz 3"]:
    """From voxels of one lattice to those of another with the same corners."""
    return (control_grid * (np.subtract(shape, 1) / np.subtract(shape_before, 1))).astype(np.float32)
