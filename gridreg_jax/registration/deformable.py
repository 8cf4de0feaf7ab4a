"""The deformable part: cubic control grids that become finer from stage to stage, fitted to the two images.

A stage works on a lattice with the fixed image's axes, from the centre of its first to that of its last voxel along
each of them. So control grids of all stages span one box, and go from lattice to lattice by a change of unit alone.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import Float, Float32
from scipy import ndimage

from gridreg_jax import geometry
from gridreg_jax.data.nifti import Volume, corner_to_corner
from gridreg_jax.data.preprocess import field_of_view, resample
from gridreg_jax.errors import InputError
from gridreg_jax.instance import flow, refine_recorded
from gridreg_jax.programs import stored
from gridreg_jax.registration.mask import kept
from gridreg_jax.transforms import bspline
from gridreg_jax.transforms.certificate import Certificate, certify
from gridreg_jax.transforms.interpolation import axis_weights, interpolate

# A side of fewer voxels need not be a multiple of 8.
LEAST_SHARED = 24
# Voxels that coarsening leaves a side: fewer hold nothing that the local correlation could compare.
LEAST_COARSENED = 16
# Voxels of the finest lattice by which the moving image's reaches beyond the fixed one's on every side: what a map may
# bring in from there.
MARGIN = 8
# The largest change of a control point in a step, in the shortest side of a voxel of the stage's lattice.
LEARNING_RATE = 0.25
# Weight of the penalty on folding, see `instance.refine_recorded`: hardly any cell is left without a proof.
FOLDING = 300.0
# Control points around what is not proven to be invertible are smoothed, at most so often.
SMOOTHINGS = 50
# How much smaller the differences of each similarity are than those of lncc: both penalties scale with it.
PENALTY_SCALE = {"lncc": 1.0, "ncc": 0.3, "nmi": 0.2, "mind": 0.1, "mse": 0.1}

# Probabilities of labels in the fixed and in the moving image, a volume a label.
LabelMaps = tuple[Sequence[Volume], Sequence[Volume]]


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """The map `y = matrix (x + u(x))` to begin with: an affine part, and what a network predicts.

    Attributes:
      matrix: RAS mm -> RAS mm; from a trained network a translation, which brings the middles of its two lattices onto
        each other.
      displacement: u at the voxels of a lattice, in its voxels; None: 0.
      sigma_mm: with a Bayesian head, there, the root of the summed variances of its three components.
      label_maps: with a segmenter, the probabilities of each label in the fixed and in the moving image.
    """

    matrix: Float[np.ndarray, "4 4"]
    displacement: Float32[np.ndarray, "X Y Z 3"] | None = None
    sigma_mm: Float32[np.ndarray, "X Y Z"] | None = None
    label_maps: LabelMaps | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """A number of steps with one control grid on one lattice.

    Attributes:
      coarsening: spacing of the lattice, in the smallest of the finest lattice.
      halvings: how often the cells of this stage are halved until the last stage.
      steps: of gradient descent.
      bending: weight of the bending energy, in the shortest side of a voxel of the stage's lattice.
    """

    coarsening: int
    halvings: int
    steps: int
    bending: float


@dataclasses.dataclass(frozen=True)
class Preset:
    """Stages, and the lattices they are on.

    Attributes:
      voxels: of the finest lattice, about, unless the image has fewer.
      cell: length of a cell of the last control grid, in voxels of the finest lattice.
      stages: in their order.
    """

    voxels: int
    cell: float
    stages: tuple[Stage, ...]


PRESETS = {
    # 2 mm for a brain of 1 mm
    "fast": Preset(750_000, 5.0, (Stage(2, 2, 20, 3.0), Stage(2, 1, 20, 3.0), Stage(2, 0, 20, 2.0))),
    # 1.7 mm
    "balanced": Preset(
        1_200_000, 3.5, (Stage(2, 2, 20, 2.0), Stage(2, 1, 20, 2.0), Stage(2, 0, 20, 0.5), Stage(1, 0, 14, 0.5))
    ),
    # 1.5 mm
    "accurate": Preset(
        1_800_000, 2.5, (Stage(2, 3, 30, 2.0), Stage(2, 2, 30, 2.0), Stage(2, 1, 40, 0.3), Stage(1, 0, 60, 0.3))
    ),
}


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage did.

    Attributes:
      grid_size: control points an axis.
      shape: voxels of the lattice.
      similarity: before each step.
      remaining: how many stages follow it.
    """

    grid_size: tuple[int, int, int]
    shape: tuple[int, int, int]
    similarity: tuple[float, ...]
    remaining: int = 0


def refining(preset: Preset, steps: int) -> Preset:
    """What of a preset follows a network: the stages with its last grid, which share the steps as they do there."""
    last = [stage for stage in preset.stages if stage.halvings == 0]
    ends = np.cumsum([0] + [stage.steps for stage in last])
    shares = np.diff(np.rint(steps * ends / ends[-1]).astype(int))
    stages = [dataclasses.replace(stage, steps=int(share)) for stage, share in zip(last, shares, strict=True)]
    return dataclasses.replace(preset, stages=tuple(stage for stage in stages if stage.steps) or (stages[-1],))


def finest_shape(fixed: Volume, voxels: int) -> tuple[int, int, int]:
    """Voxels an axis of the finest lattice for a fixed image.

    Isotropic where the image is fine enough, hardly finer than the image, and not many more voxels than asked for.
    Sides are multiples of 8, but for those of few or thick slices, so that images of about one size share programs.
    """
    shape, spacing = np.array(fixed.array.shape), geometry.spacing(fixed.affine)
    step = spacing.min()
    while np.prod(size := np.minimum(shape, (shape - 1) * spacing / step + 1)) > voxels:
        step *= 1.02
    whole = np.where(shape < LEAST_SHARED, shape, 8 * np.ceil(shape / 8))
    fewer = np.minimum(shape, np.maximum(8, 8 * np.rint(size / 8)))
    return tuple(int(n) for n in np.where(size < shape, fewer, whole))


def deform(
    fixed: Volume,
    moving: Volume,
    matrix: Float[np.ndarray, "4 4"],
    *,
    preset: Preset,
    similarity: str = "lncc",
    grid: int | float | None = None,
    mask: Volume | None = None,
    method: str = "grid",
    start: Float[np.ndarray, "X Y Z 3"] | None = None,
    label_maps: LabelMaps | None = None,
    notify: Callable[[StageResult], None] = lambda result: None,
) -> tuple[Float[np.ndarray, "gx gy gz 3"], Certificate, list[StageResult], float | None]:
    """The control grid u for which `moving(matrix(x + u(x)))` is most like `fixed(x)`.

    Args:
      fixed: normalised, on its finest lattice (`finest_shape`).
      moving: normalised, on any lattice.
      matrix: RAS mm of the fixed image -> RAS mm of the moving image.
      preset: the stages.
      similarity: a name in `PENALTY_SCALE`.
      grid: for the last stage, the number of control points an axis (int), or the length of a cell in mm (float), to
        which each axis comes as close as cells of at least two voxels can; None for the preset's.
      mask: where the fixed image counts (values other than 0); None: everywhere.
      method: a name in `instance.METHODS`. With a velocity, the control grid returned is the closest to its flow.
      start: u to begin with, in voxels of `fixed` at its voxels; None: 0. Not with a velocity. The bending energy
        is that of the change, in each stage.
      label_maps: the overlap of these is to grow too (see `instance.refine_recorded`); on any lattices.
      notify: takes the result of each stage when it ends.

    Returns:
      The control grid in voxels of `fixed`; what is proven about it; what each stage did; and by how much (root mean
      square, mm) the grid departs from the flow of a velocity, else None. Where the map is not proven to be invertible,
      control points are smoothed; the certificate says whether that was enough.

    Raises:
      InputError: a control grid that is too coarse or too fine for the image.
    """
    cells = last_cells(fixed, preset, grid)
    shape, results = fixed.array.shape, []
    control_grid = None if start is None else _fitted(start, _grid_size(cells, preset.stages[0]))
    options = dict(similarity=similarity, method=method, from_start=start is not None)
    with ThreadPoolExecutor(1) as pool:
        # The finer images are made while the first stages run.
        images = {
            coarsening: pool.submit(
                on_lattice, fixed, moving, mask, matrix, coarsening, margin=MARGIN, label_maps=label_maps
            )
            for coarsening in dict.fromkeys(stage.coarsening for stage in preset.stages)
        }
        for stage in preset.stages:
            control_grid, result = _run(control_grid, fixed, images[stage.coarsening].result(), stage, cells, **options)
            results.append(dataclasses.replace(result, remaining=len(preset.stages) - 1 - len(results)))
            notify(results[-1])
    target = None if method == "grid" else np.asarray(_flow(control_grid[None], shape)[0])
    if target is not None:
        control_grid = _fitted(target, control_grid.shape[:3])
    certificate = certify(control_grid, shape)
    for _ in range(SMOOTHINGS):
        if certificate.invertible:
            break
        control_grid = _smoothed(control_grid, certificate.cells)
        certificate = certify(control_grid, shape)
    if target is None:
        return control_grid, certificate, results, None
    departure_mm = (_dense(control_grid[None], shape)[0] - target) * geometry.spacing(fixed.affine)
    return control_grid, certificate, results, float(np.sqrt(np.mean(np.sum(departure_mm**2, axis=-1))))


def load(
    fixed: Volume,
    *,
    preset: Preset,
    similarity: str = "lncc",
    grid: int | float | None = None,
    method: str = "grid",
    from_start: bool = False,
    labels: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Has the programs ready that `deform` will run: for another thread, while the affine start is sought.

    Args:
      from_start: whether `deform` will have a `start`.
      labels: how many maps of labels it will have of each image.
      stopped: whether nobody wants them any more; asked before each stage's.
    """
    cells = last_cells(fixed, preset, grid)
    for stage in preset.stages:
        if stopped():
            return
        lattice = _lattice_shape(fixed, stage.coarsening)
        control_grid = jax.ShapeDtypeStruct((1, *_grid_size(cells, stage), 3), np.float32)
        image, wide = (
            jax.ShapeDtypeStruct((1, *shape, 1 + labels), np.float32)
            for shape in (lattice, _extended(fixed, lattice, MARGIN)[1])
        )
        known = jax.ShapeDtypeStruct((1, *lattice), np.bool_)
        spacing = jax.ShapeDtypeStruct((3,), np.float32)
        options = dict(steps=stage.steps, similarity=similarity, method=method, from_start=from_start)
        _fit.load(control_grid, image, wide, known, *_weights(stage, similarity, method), spacing, **options)


def last_cells(fixed: Volume, preset: Preset, grid: int | float | None) -> Sequence[int]:
    """Cells an axis of the last control grid. Arguments and errors as for `deform`."""
    shape, spacing = np.array(fixed.array.shape), geometry.spacing(fixed.affine)
    if isinstance(grid, int):
        if not 4 <= grid <= max(shape) + 2:
            raise InputError(f"a control grid has from 4 to {max(shape) + 2} points an axis here, not {grid}")
        return [min(grid - 3, int(size) - 1) for size in shape]
    if grid is not None and not spacing.min() <= grid < np.inf:  # nor is NaN
        raise InputError(f"cells of {grid:g} mm: give a length from that of a voxel here, {spacing.min():.3g} mm")
    cells = []
    for side_mm, size in zip((shape - 1) * spacing, shape, strict=True):
        most = max(1, (int(size) - 1) // 2)  # no cell of less than two voxels
        if grid is not None:
            cells.append(min(range(1, most + 1), key=lambda count, side_mm=side_mm: abs(side_mm / count - grid)))
            continue
        wanted = side_mm / (preset.cell * spacing.min())
        # Whole numbers of the first stage's cells, so that halving is exact, unless these were none or too small.
        halvings = max(stage.halvings for stage in preset.stages)
        while halvings and not 1 <= round(wanted / 2**halvings) <= most / 2**halvings:
            halvings -= 1
        cells.append(min(max(1, round(wanted / 2**halvings)) * 2**halvings, most))
    return cells


def _grid_size(cells: Sequence[int], stage: Stage) -> tuple[int, int, int]:
    return tuple(-(-count // 2**stage.halvings) + 3 for count in cells)


def on_lattice(
    fixed: Volume,
    moving: Volume,
    mask: Volume | None,
    matrix,
    coarsening: int,
    *,
    margin: int = 0,
    label_maps: LabelMaps | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two images and where both are known, on a lattice of `coarsening` times the finest spacing of the fixed image's.

    Args:
      margin: by how much the moving image's lattice is longer on every side, in voxels of the finest lattice.
      label_maps: come behind the images, each in a channel of its own.

    Returns:
      The fixed image `[1, X, Y, Z, C]`, the moving one under the affine map `[1, x, y, z, C]`, in the middle of which
      that lattice lies, and where both are known before the deformation `[1, X, Y, Z]`.
    """
    shape = _lattice_shape(fixed, coarsening)
    affine = corner_to_corner(fixed, shape)
    wide_affine, wide = _extended(fixed, shape, margin)
    known = field_of_view(moving, matrix @ affine, shape)
    if mask is not None:
        known &= kept(mask, affine, shape)
    # Where the moving image has much thicker slices, the fixed one is blurred like them: its edges would else be fitted
    # to those of the interpolation between slices. Blurs as in `resample`, in voxels of the lattice.
    own, its = (
        np.linalg.norm((np.linalg.inv(to_world) @ volume.affine)[:3, :3], axis=1)
        for to_world, volume in ((affine, fixed), (matrix @ affine, moving))
    )
    blur = 0.5 * np.sqrt(np.maximum(its**2 - 2 * np.maximum(own, 1) ** 2, 0))
    of_fixed, of_moving = label_maps or ((), ())
    with ThreadPoolExecutor(2) as pool:  # SciPy lets go of the interpreter.
        images = (
            pool.map(lambda volume: ndimage.gaussian_filter(resample(volume, affine, shape), blur), (fixed, *of_fixed)),
            pool.map(lambda volume: resample(volume, matrix @ wide_affine, wide), (moving, *of_moving)),
        )
        return *(np.stack(tuple(channels), axis=-1)[None] for channels in images), known[None]


def _extended(fixed: Volume, shape: tuple[int, int, int], margin: int):
    """Affine (voxel -> RAS mm) and shape of a lattice of the fixed image's with whole voxels more on every side."""
    affine = corner_to_corner(fixed, shape)
    more = np.rint(margin * geometry.spacing(fixed.affine).min() / geometry.spacing(affine)).astype(int)
    shift = np.eye(4)
    shift[:3, 3] = -more
    return affine @ shift, tuple(int(n) for n in shape + 2 * more)


def _lattice_shape(fixed: Volume, coarsening: int) -> tuple[int, int, int]:
    size, spacing = np.array(fixed.array.shape), geometry.spacing(fixed.affine)
    # Thick slices stay until the others are as thick.
    ratio = np.maximum(1, np.rint(coarsening * spacing.min() / spacing))
    return tuple(int(n) for n in np.maximum(np.minimum(LEAST_COARSENED, size), np.rint(size / ratio)))


def _weights(stage: Stage, similarity: str, method: str) -> tuple[np.float32, np.float32 | None]:
    """Of the bending energy and of the penalty on folding, of the type that `load` announces."""
    scale = np.float32(PENALTY_SCALE[similarity])
    return scale * np.float32(stage.bending), scale * np.float32(FOLDING) if method == "grid" else None


def _run(control_grid, fixed, images, stage: Stage, cells: Sequence[int], *, similarity: str, method: str, **options):
    """A stage, from a control grid (or None) in voxels of the fixed image to another one, with what it did."""
    grid_size, shape, lattice = _grid_size(cells, stage), fixed.array.shape, images[0].shape[1:4]
    spacing = geometry.spacing(corner_to_corner(fixed, lattice))
    if control_grid is None:
        control_grid = np.zeros((*grid_size, 3), np.float32)
    elif control_grid.shape[:3] != grid_size:
        control_grid = np.asarray(_halved(control_grid[None], grid_size)[0])[0]
    found, history = _fit(
        _rescaled(control_grid, shape, lattice)[None],
        *images,
        *_weights(stage, similarity, method),
        (spacing / spacing.min()).astype(np.float32),
        steps=stage.steps,
        similarity=similarity,
        method=method,
        **options,
    )
    similarities = tuple(float(value) for value in np.asarray(history)[:, 0])
    return _rescaled(np.asarray(found)[0], lattice, shape), StageResult(grid_size, lattice, similarities)


_bspline = functools.partial(interpolate, method="bspline")
_halved, _flow, _dense = (jax.jit(function, static_argnums=1) for function in (bspline.refine, flow, _bspline))


@functools.partial(stored, static_argnames=("steps", "similarity", "method", "from_start"), library_sums=False)
def _fit(control_grid, fixed, moving, mask, bending, folding, spacing, *, steps, similarity, method, from_start):
    return refine_recorded(
        control_grid,
        fixed[..., :1],
        moving[..., :1],
        label_maps=(fixed[..., 1:], moving[..., 1:]) if fixed.shape[-1] > 1 else None,
        steps=steps,
        bending=bending,
        learning_rate=LEARNING_RATE,
        interpolator="bspline",
        similarity=similarity,
        mask=mask,
        folding=folding,
        method=method,
        from_start=from_start,
        spacing=spacing,
    )


def _fitted(displacement: Float[np.ndarray, "X Y Z 3"], grid_size) -> Float[np.ndarray, "gx gy gz 3"]:
    """The control grid whose spline is closest to a displacement at the voxels."""
    shape = displacement.shape[:3]
    for axis in (2, 1, 0):
        inverse = np.linalg.pinv(axis_weights("bspline", grid_size[axis], shape[axis]))
        # One product for each row: a large one would start threads of BLAS', which then stand in the way of XLA's.
        displacement = inverse @ displacement.reshape(math.prod(shape[:axis]), shape[axis], -1)
    return displacement.reshape(*grid_size, 3).astype(np.float32)


def _smoothed(control_grid, cells) -> Float[np.ndarray, "gx gy gz 3"]:
    """The control points on which some cells depend go half-way to the mean of 27, their neighbours and themselves."""
    near = np.zeros(control_grid.shape[:3], bool)
    for i, j, k in cells:
        near[i : i + 4, j : j + 4, k : k + 4] = True
    means = ndimage.uniform_filter(control_grid, (3, 3, 3, 1), mode="nearest")
    return np.where(near[..., None], (control_grid + means) / 2, control_grid)


def _rescaled(control_grid, shape_before, shape) -> Float[np.ndarray, "gx gy gz 3"]:
    """From voxels of one lattice to those of another with the same corners."""
    return (control_grid * (np.subtract(shape, 1) / np.subtract(shape_before, 1))).astype(np.float32)
