"""Transforms as ITK has them, for SimpleITK, ANTs, 3D Slicer and others that build on it; `itk_files` stores them.

ITK's transforms take points of the fixed image to the moving image, as displacements do here, but in LPS mm: x and y
have the opposite sign of RAS. A control grid is kept as it is, not as a dense field: in kilobytes, and to rounding.

Of several transforms in a list, as in ITK's composite transform, the last is applied first: `y = A(x + u(x))` is listed
as affine, then B-spline.

Source: Insight Toolkit, itkBSplineTransform, itkMatrixOffsetTransformBase, itkDisplacementFieldTransform,
itkCompositeTransform, and those in `AFFINES`.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Num
from scipy import ndimage

from gridreg_jax import geometry
from gridreg_jax.errors import InputError
from gridreg_jax.transforms.certificate import uniform_weights
from gridreg_jax.transforms.interpolation import check_grid_size

# From RAS to LPS and back.
FLIP = np.array([-1.0, -1.0, 1.0])
AFFINE, BSPLINE = "AffineTransform_double_3_3", "BSplineTransform_double_3_3"
FIELD = "DisplacementFieldTransform_double_3_3"
# ITK's affine maps, each with its number of parameters. The fixed ones are the centre.
AFFINES = {
    "AffineTransform": 12,
    "MatrixOffsetTransformBase": 12,
    "IdentityTransform": 0,
    "TranslationTransform": 3,
    "ScaleTransform": 3,
    "Euler3DTransform": 6,
    "QuaternionRigidTransform": 7,
    "VersorTransform": 3,
    "VersorRigid3DTransform": 6,
    "Similarity3DTransform": 7,
    "ScaleVersor3DTransform": 9,
    "ScaleSkewVersor3DTransform": 15,
}
# Affine maps with another number of fixed parameters than 3: of an Euler transform there may be a fourth, which is not
# 0 where the order of the angles is z, y, x; the others have no need of a centre.
FIXED_COUNTS = {"Euler3DTransform": (3, 4), "IdentityTransform": (0, 3), "TranslationTransform": (0, 3)}
# Those that interpolate a grid, and the order of their splines.
ORDERS = {BSPLINE: 3, FIELD: 1}
# Voxels that are mapped at a time.
SLAB = 2_000_000

ControlGrid = Float[np.ndarray, "gx gy gz 3"] | Float[Array, "gx gy gz 3"]


@dataclasses.dataclass(frozen=True, eq=False)
class ItkTransform:
    """One transform as ITK stores it.

    Attributes:
      type: ITK's name, such as "BSplineTransform_double_3_3".
      parameters: LPS mm; their order depends on the type.
      fixed_parameters: the centre of an affine; of a grid its size, origin, spacing (LPS mm) and direction, by rows.
      stored: the name that a file has for it, where `understood` gave it another type.
    """

    type: str
    parameters: Float64[np.ndarray, " P"]
    fixed_parameters: Float64[np.ndarray, " F"]
    stored: str = ""


def bspline_transform(
    control_grid: ControlGrid, shape: tuple[int, int, int], affine_fixed: Num[np.ndarray, "4 4"]
) -> ItkTransform:
    """The clamped cubic spline of a control grid as ITK's B-spline transform: the same map on the lattice.

    ITK's spline has uniform knots and gives no displacement outside its own box. So the coefficients change basis,
    and one ring is added (`with_ring`): without it, rounding would leave voxels at the border without displacement. The
    box reaches one cell beyond the corner voxels; farther out there is no displacement.

    Args:
      control_grid: displacements in voxels, at least 4 control points an axis.
      shape: (X, Y, Z), the fixed lattice.
      affine_fixed: voxels of the fixed lattice -> RAS mm.

    Raises:
      InputError: too few control points, an axis of a single voxel, or an affine that cannot be inverted.
    """
    check_grid_size(control_grid.shape[:3], "bspline")
    coefficients = np.asarray(control_grid, np.float64)
    for g in control_grid.shape[:3]:
        # Each product moves the axis it is for to the end: after three, the components come first.
        coefficients = np.tensordot(coefficients, uniform_weights(g), (0, 1))
    coefficients = with_ring(np.moveaxis(coefficients, 0, -1))
    # The first uniform B-spline is centred a cell outside the lattice, and the ring two cells.
    grid_affine = _grid_affine(shape, [g - 3 for g in control_grid.shape[:3]], affine_fixed, start=-2)
    values = coefficients @ affine_fixed[:3, :3].T * FLIP
    return ItkTransform(BSPLINE, values.ravel(order="F"), _geometry(values.shape[:3], grid_affine))


def with_ring(coefficients: Float64[np.ndarray, "x y z 3"]) -> Float64[np.ndarray, "X Y Z 3"]:
    """Coefficients of a uniform cubic spline with one more at either end of each axis: it then reaches a cell farther.

    At the new ends it has the values of the former ones. Copies of the outermost coefficients, which may be many times
    larger than any displacement inside, would let it grow to their size there.

    Source: the uniform cubic B-spline, which is (1, 4, 1) / 6 at its knots.
    """
    for axis in range(3):
        c = np.moveaxis(coefficients, axis, 0)
        first, last = c[2] + 3 * c[1] - 3 * c[0], c[-3] + 3 * c[-2] - 3 * c[-1]
        coefficients = np.moveaxis(np.concatenate([first[None], c, last[None]]), 0, axis)
    return coefficients


def displacement_field(
    control_grid: ControlGrid, shape: tuple[int, int, int], affine_fixed: Num[np.ndarray, "4 4"]
) -> ItkTransform:
    """The trilinear map of a control grid as a coarse displacement field with a voxel for each control point.

    Exact: ITK interpolates fields linearly. Half a cell beyond the corner voxels the displacement ends. (ITK has
    linear B-spline transforms too, but ANTs does not read them.) Arguments and errors as for `bspline_transform`,
    with at least 2 control points an axis.
    """
    check_grid_size(control_grid.shape[:3], "trilinear")
    grid_affine = _grid_affine(shape, [g - 1 for g in control_grid.shape[:3]], affine_fixed, start=0)
    values = np.asarray(control_grid, np.float64) @ affine_fixed[:3, :3].T * FLIP
    parameters = np.moveaxis(values, -1, 0).ravel(order="F")
    return ItkTransform(FIELD, parameters, _geometry(values.shape[:3], grid_affine))


def affine_transform(matrix: Num[np.ndarray, "4 4"]) -> ItkTransform:
    """An affine map as ITK's affine transform.

    Args:
      matrix: RAS mm of the fixed image -> RAS mm of the moving image.
    """
    linear = FLIP[:, None] * matrix[:3, :3] * FLIP
    return ItkTransform(AFFINE, np.r_[linear.ravel(), FLIP * matrix[:3, 3]], np.zeros(3))


def dense_field(displacement_mm: Float[np.ndarray, "X Y Z 3"], affine: Num[np.ndarray, "4 4"]) -> ItkTransform:
    """A displacement at the voxels of a lattice as ITK's displacement field.

    Args:
      displacement_mm: RAS mm.
      affine: voxels of the lattice -> RAS mm.
    """
    parameters = np.moveaxis(np.asarray(displacement_mm, np.float64) * FLIP, -1, 0).ravel(order="F")
    return ItkTransform(FIELD, parameters, _geometry(displacement_mm.shape[:3], affine))


def affine_matrix(transforms: Sequence[ItkTransform]) -> Float64[np.ndarray, "4 4"]:
    """The map of affine transforms, RAS mm -> RAS mm; of several, the last is applied first.

    Raises:
      InputError: as for `understood`.
    """
    matrix, flip = np.eye(4), np.diag([*FLIP, 1.0])
    for transform in map(understood, transforms):
        linear, center = transform.parameters[:9].reshape(3, 3), transform.fixed_parameters
        offset = center + transform.parameters[9:] - linear @ center
        matrix = matrix @ np.vstack([np.c_[linear, offset], [0, 0, 0, 1]])
    return flip @ matrix @ flip


def apply(transforms: Sequence[ItkTransform], points_mm: Float[np.ndarray, "P 3"]) -> Float64[np.ndarray, "P 3"]:
    """Where ITK takes points of the fixed image: RAS mm -> RAS mm. The last transform is applied first.

    Raises:
      InputError: as for `understood`.
    """
    return _apply([understood(transform) for transform in transforms], points_mm)


def _apply(transforms: Sequence[ItkTransform], points_mm: Float[np.ndarray, "P 3"]) -> Float64[np.ndarray, "P 3"]:
    """`apply` of what is `understood` already."""
    points = points_mm * FLIP
    for transform in reversed(transforms):
        points = _affine_map(transform, points) if transform.type == AFFINE else _grid_map(transform, points)
    return points * FLIP


def continued_displacement(
    transform: ItkTransform, points_mm: Float[np.ndarray, "P 3"]
) -> Float64[np.ndarray, "P 3"]:
    """Displacement of a grid (understood) at points, RAS mm; outside its domain that of the nearest point inside."""
    return _sampled(transform, points_mm * FLIP)[0] * FLIP


def in_domain(transform: ItkTransform, points_mm: Float[np.ndarray, "P 3"]) -> Bool[np.ndarray, " P"]:
    """Whether points (RAS mm) lie in the domain of a grid (understood), outside of which it moves nothing."""
    return _index(transform, points_mm * FLIP)[1]


def displacement(
    transforms: Sequence[ItkTransform], shape: tuple[int, int, int], affine: Num[np.ndarray, "4 4"]
) -> Float32[np.ndarray, "X Y Z 3"]:
    """Displacement of the whole map at the voxels of a lattice, in its voxels. The last transform is applied first.

    Args:
      transforms: as for `apply`.
      shape: (X, Y, Z), the lattice.
      affine: its voxels -> RAS mm.

    Raises:
      InputError: as for `apply`.
    """
    transforms = [understood(transform) for transform in transforms]
    result = np.empty((*shape, 3), np.float32)
    rows = max(1, SLAB // math.prod(shape[1:]))
    for first in range(0, shape[0], rows):
        slab = result[first : first + rows]
        voxels = np.stack(np.meshgrid(*map(np.arange, slab.shape[:3]), indexing="ij"), axis=-1).reshape(-1, 3)
        voxels = voxels + [first, 0.0, 0.0]
        points, rest = geometry.voxel_to_world(voxels, affine), transforms
        if transforms[-1].type in ORDERS:
            shift = affine.copy()
            shift[:3, 3] += first * affine[:3, 0]
            if (moved := _on_lattice(transforms[-1], slab.shape[:3], shift)) is not None:
                points, rest = points + moved.reshape(-1, 3) * FLIP, rest[:-1]
        slab[:] = (geometry.world_to_voxel(_apply(rest, points), affine) - voxels).reshape(slab.shape)
    return result


def understood(transform: ItkTransform) -> ItkTransform:
    """The same map as one of three types, in double precision: affine transform, cubic B-spline or displacement field.

    Raises:
      InputError: a type other than these and `AFFINES`, in three dimensions; numbers of parameters that do not fit it;
        one that is not finite; a matrix, or the axes of a grid, that cannot be inverted.
    """
    kind, _, space = transform.type.replace("_float_", "_double_").partition("_double_")
    grid = f"{kind}_double_3_3" in ORDERS
    if not grid and kind not in AFFINES:
        known = ", ".join([*AFFINES, *(name.split("_")[0] for name in ORDERS)])
        raise InputError(f"{transform.type} is not understood: the known ones are {known}")
    if space != "3_3":
        raise InputError(f"{transform.type} is not understood: {kind}_double_3_3 is: three dimensions, cubic splines")
    if not (np.isfinite(transform.parameters).all() and np.isfinite(transform.fixed_parameters).all()):
        raise InputError(f"{transform.type} has parameters that are not finite: each is to be a number")
    if not grid:
        return _as_affine(transform, kind)
    result = dataclasses.replace(transform, type=f"{kind}_double_3_3", stored=transform.stored or transform.type)
    _check_grid(result)
    return result


def _grid_affine(shape, cells: Sequence[int], affine_fixed, *, start: int) -> Float64[np.ndarray, "4 4"]:
    """From cells, counted so that the lattice begins at `-start`, to RAS mm."""
    if min(shape) < 2:
        raise InputError(f"a control grid needs at least 2 voxels an axis, not {shape}")
    if not (np.isfinite(affine_fixed).all() and np.linalg.det(affine_fixed[:3, :3])):
        raise InputError(f"the affine of the fixed image cannot be inverted: {affine_fixed[:3].tolist()}")
    cell = (np.array(shape) - 1) / cells
    grid_affine = np.diag([*cell, 1.0])
    grid_affine[:3, 3] = start * cell
    return affine_fixed @ grid_affine


def _geometry(size: Sequence[int], grid_affine: Float64[np.ndarray, "4 4"]) -> Float64[np.ndarray, "18"]:
    """ITK's fixed parameters of a grid: size, origin, spacing, direction."""
    spacing = geometry.spacing(grid_affine)
    direction = FLIP[:, None] * grid_affine[:3, :3] / spacing
    return np.concatenate([size, FLIP * grid_affine[:3, 3], spacing, direction.ravel()])


def _as_affine(transform: ItkTransform, kind: str) -> ItkTransform:
    """An affine map of any kind of `AFFINES` as the affine transform that it is."""
    values, fixed = transform.parameters, transform.fixed_parameters
    counts = FIXED_COUNTS.get(kind, (3,))
    if values.size != AFFINES[kind] or fixed.size not in counts:
        raise InputError(
            f"{transform.type} has {AFFINES[kind]} parameters and {' or '.join(map(str, counts))} fixed ones, "
            f"not {values.size} and {fixed.size}"
        )
    linear, translation = np.eye(3), np.zeros(3)
    match kind:
        case "AffineTransform" | "MatrixOffsetTransformBase":
            linear, translation = values[:9].reshape(3, 3), values[9:]
        case "IdentityTransform":
            pass
        case "TranslationTransform":
            translation = values
        case "ScaleTransform":
            linear = np.diag(values)
        case "QuaternionRigidTransform":
            linear, translation = _turn(values[:3], values[3]), values[4:]
        case "Euler3DTransform":
            x, y, z = (_turn(np.sin(a / 2) * axis, np.cos(a / 2)) for a, axis in zip(values, np.eye(3), strict=False))
            linear, translation = z @ y @ x if fixed[3:].any() else z @ x @ y, values[3:]
        case _:
            # ITK makes a versor that is not below 1 in length that much shorter.
            versor = values[:3] / max(1, np.linalg.norm(values[:3]) * (1 + 1e-10))
            linear = _turn(versor, math.sqrt(1 - versor @ versor))
            if values.size > 3:
                translation = values[3:6]
            if kind == "Similarity3DTransform":
                linear *= values[6]
            elif values.size > 6:
                linear += np.diag(values[6:9] - 1)
            if values.size > 9:
                linear[~np.eye(3, dtype=bool)] += values[9:]
    if np.linalg.matrix_rank(linear) < 3:
        raise InputError(f"{transform.type} cannot be inverted: its matrix is {linear.tolist()}")
    center = fixed[:3] if fixed.size else np.zeros(3)
    return ItkTransform(AFFINE, np.r_[linear.ravel(), translation], center, transform.stored or transform.type)


def _turn(vector: Float64[np.ndarray, "3"], scalar: float) -> Float64[np.ndarray, "3 3"]:
    """The matrix of a quaternion; as in ITK one that is not of length 1 scales too."""
    x, y, z = vector
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return (scalar**2 - vector @ vector) * np.eye(3) + 2 * np.outer(vector, vector) + 2 * scalar * cross


def _check_grid(transform: ItkTransform) -> None:
    """Refuses a grid whose numbers do not fit each other."""
    name, fixed, least = transform.stored, transform.fixed_parameters, 4 if transform.type == BSPLINE else 1
    if fixed.size != 18:
        raise InputError(f"{name} has 18 fixed parameters, not {fixed.size}")
    size, spacing, direction = fixed[:3], fixed[6:9], fixed[9:].reshape(3, 3)
    if (size % 1).any() or size.min() < least:
        raise InputError(f"{name} has a size of whole numbers, at least {least} an axis, not {size.tolist()}")
    if transform.parameters.size != 3 * math.prod(size):
        raise InputError(
            f"{name} has 3 parameters a grid point, {3 * math.prod(size):.0f} for the size {size.tolist()}, "
            f"not {transform.parameters.size}"
        )
    if spacing.min() <= 0 or np.linalg.matrix_rank(direction) < 3:
        raise InputError(
            f"{name} has a spacing above 0 and a direction that can be inverted, not {spacing.tolist()} and "
            f"{direction.tolist()}"
        )


def _affine_map(transform: ItkTransform, points: Float64[np.ndarray, "P 3"]) -> Float64[np.ndarray, "P 3"]:
    center = transform.fixed_parameters
    return (points - center) @ transform.parameters[:9].reshape(3, 3).T + center + transform.parameters[9:]


def _grid_map(transform: ItkTransform, points: Float64[np.ndarray, "P 3"]) -> Float64[np.ndarray, "P 3"]:
    displacement, inside = _sampled(transform, points)
    return points + np.where(inside[:, None], displacement, 0)


def _sampled(transform: ItkTransform, points: Float64[np.ndarray, "P 3"]):
    """Displacement (LPS mm) of a grid at the nearest points of its domain, and whether the points lie there."""
    values, _, _ = _grid(transform)
    index, inside = _index(transform, points)
    interpolation = _interpolation(ORDERS[transform.type])
    return np.stack([ndimage.map_coordinates(part, index.T, **interpolation) for part in values], axis=1), inside


def _index(transform: ItkTransform, points: Float64[np.ndarray, "P 3"]):
    """Index of a grid (`P 3`) at points (LPS mm), as near as its domain reaches, and whether the points lie there."""
    values, linear, origin = _grid(transform)
    index, inside = _clipped((points - origin) @ linear.T, np.array(values.shape[1:]), ORDERS[transform.type])
    return index, inside.all(axis=1)


def _on_lattice(
    transform: ItkTransform, shape: tuple[int, int, int], affine: Num[np.ndarray, "4 4"]
) -> Float64[np.ndarray, "X Y Z 3"] | None:
    """Displacement (LPS mm) of a grid at the voxels of a lattice whose axes run along its own, one axis at a time.

    None where they do not.
    """
    values, linear, origin = _grid(transform)
    steps = linear @ (FLIP[:, None] * affine[:3, :3])  # of the index, for a step along each axis of the lattice
    start = linear @ (FLIP * affine[:3, 3] - origin)
    along = np.abs(steps).argmax(axis=1)
    across = np.abs(steps) @ (np.array(shape) - 1) - np.abs(steps[range(3), along]) * (np.array(shape) - 1)[along]
    if sorted(along) != [0, 1, 2] or across.max() > 1e-5:
        return None
    order = ORDERS[transform.type]
    for axis, size in enumerate(values.shape[1:]):
        index, inside = _clipped(start[axis] + steps[axis, along[axis]] * np.arange(shape[along[axis]]), size, order)
        weights = [ndimage.map_coordinates(unit, index[None], **_interpolation(order)) for unit in np.eye(size)]
        # Each product moves the axis it is for to the end: after three, the components still come first.
        values = np.tensordot(values, np.array(weights) * inside, (1, 0))
    return values.transpose(*(np.argsort(along) + 1), 0)


def _grid(transform: ItkTransform):
    """Values at the grid's points, component first, and linear part and origin of the map from LPS mm to its index."""
    fixed = transform.fixed_parameters
    size, origin, spacing, direction = fixed[:3].astype(int), fixed[3:6], fixed[6:9], fixed[9:].reshape(3, 3)
    # A B-spline has one component after the other, a field one point after the other; x is the fastest of the axes.
    if transform.type == BSPLINE:
        values = transform.parameters.reshape(3, *size[::-1]).transpose(0, 3, 2, 1)
    else:
        values = transform.parameters.reshape(*size[::-1], 3).transpose(3, 2, 1, 0)
    return values, np.linalg.inv(direction * spacing), origin


def _clipped(index: Float64[np.ndarray, "..."], size, order: int):
    """The index within the domain of a grid, and whether it lay there."""
    # A cubic cell needs two coefficients on either side; voxels of a field reach half a voxel beyond their centres.
    low, high = (1, size - 2) if order == 3 else (-0.5, size - 0.5)
    inside = (index >= low) & ((index <= high) if order == 3 else (index < high))
    return np.clip(index, np.maximum(low, 0), np.minimum(high, size - 1)), inside


def _interpolation(order: int) -> dict:
    return {"order": order, "prefilter": False, "mode": "nearest"}
