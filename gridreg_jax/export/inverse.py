"""The inverse of transforms as a displacement field, and how far it leads from where it should."""

import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Bool, Float, Float64, Num
from scipy import ndimage

from gridreg_jax import geometry
from gridreg_jax.cores import cores
from gridreg_jax.export import itk
from gridreg_jax.export.itk import ItkTransform

# A voxel has an inverse when its point comes at least so near to it. The search for the point ends nearer, as other
# transforms may stretch what is left; for single points, which cost little, nearer still.
TOLERANCE_MM, LATTICE_MM, POINT_MM = 0.01, 1e-3, 1e-6
ITERATIONS = 60
# Points that are searched at a time by each thread, and threads at most: each takes some tens of MiB.
POINTS, THREADS = 100_000, 8


@dataclasses.dataclass(frozen=True)
class InverseErrors:
    """Distances `|T(x) - y|` between the voxels y of a lattice and where the transform T takes their points x.

    Attributes:
      voxels: how many the lattice has.
      mean_mm, max_mm: over the voxels with an error of at most `TOLERANCE_MM`; NaN where there are none.
      missed: voxels with a larger one: the transform takes no point there, or none was found.
      missed_mm: their largest error, else 0.
      outside: voxels whose point lies outside the domain of a grid, where that moves nothing.
      doubled: voxels to which a point inside the domain comes, and one outside; the one inside is taken.
      folds, probes: places at which the transform turns space inside out, so that several points come to one place; of
        how many that were looked at.
    """

    voxels: int
    mean_mm: float
    max_mm: float
    missed: int
    missed_mm: float
    outside: int
    doubled: int
    folds: int
    probes: int

    def __str__(self) -> str:
        return (
            f"inverse: error {self.mean_mm:.2g} mm on average, {self.max_mm:.2g} mm at most, at "
            f"{self.voxels - self.missed} of {self.voxels} voxels; the points of {self.outside} lie outside the "
            "transform's domain"
        )

    def warnings(self) -> list[str]:
        """Lines about where there is no inverse, or more than one."""
        lines = []
        if self.missed:
            lines.append(
                f"to {self.missed} of {self.voxels} voxels no point was found that comes within {TOLERANCE_MM} mm, by "
                f"up to {self.missed_mm:.2g} mm; a displacement that ends at its border is inverted as if it went on"
            )
        if self.doubled:
            lines.append(
                f"to {self.doubled} of {self.voxels} voxels two points come, one from outside the transform's domain: "
                "the one inside is written"
            )
        if self.folds:
            lines.append(
                f"the transform folds at {self.folds} of {self.probes} places of its domain, which may reach beyond "
                "the image it was made for: several points come to one voxel there, and one of them is written"
            )
        return lines


def invert(
    transforms: Sequence[ItkTransform], shape: tuple[int, int, int], affine: Num[np.ndarray, "4 4"]
) -> tuple[ItkTransform, InverseErrors]:
    """The displacement field that takes each voxel y of a lattice to a point x with `T(x) = y`.

    Found by Broyden's steps from where the affine transforms alone lead back, at every second voxel first. Between
    voxels ITK interpolates it, which the errors do not count; half a voxel beyond the lattice it ends. Where T takes no
    point to y, because a grid's displacement ends at the border of its domain, x is what it were if the displacement
    went on as at that border.

    Args:
      transforms: T, of which the last is applied first.
      shape: (X, Y, Z), the lattice, on the side to which T takes points.
      affine: its voxels -> RAS mm.

    Raises:
      InputError: as for `itk.understood`.

    Source: Broyden, Mathematics of Computation 19 (1965), the first of its methods.
    """
    transforms = [itk.understood(transform) for transform in transforms]
    coarse_shape = tuple(n // 2 + 1 for n in shape)
    step = np.maximum(np.subtract(shape, 1), 1) / np.maximum(np.subtract(coarse_shape, 1), 1)
    coarse_affine = affine @ np.diag([*step, 1.0])
    folds, probes = _folds(transforms, coarse_shape, coarse_affine)
    grids = _grids(transforms)
    coarse = np.zeros((*coarse_shape, 3 * grids))
    displacement_mm = np.empty((*shape, 3))
    error, outside, doubled = np.empty(shape), np.empty(shape, bool), np.empty(shape, bool)

    def search_coarse(rows: slice) -> None:
        points_mm = geometry.voxel_to_world(_voxels(rows, coarse_shape), coarse_affine)
        _, guesses, *_ = _points(transforms, points_mm, coarse[rows].reshape(-1, 3 * grids), LATTICE_MM)
        coarse[rows] = guesses.reshape(coarse[rows].shape)

    def search(rows: slice) -> None:
        points_mm = geometry.voxel_to_world(_voxels(rows, shape), affine)
        guesses = coarse
        for weights in (to_fine[0][:, rows], *to_fine[1:]):
            guesses = np.tensordot(guesses, weights, (0, 0))  # moves the axis it is for to the end
        guesses = guesses.reshape(3 * grids, -1).T
        found, _, outside[rows].flat, doubled[rows].flat = _points(transforms, points_mm, guesses, LATTICE_MM)
        displacement_mm[rows] = (found - points_mm).reshape(displacement_mm[rows].shape)
        error[rows].flat = np.linalg.norm(itk.apply(transforms, found) - points_mm, axis=1)

    to_fine = [_interpolation(*sizes) for sizes in zip(coarse_shape, shape, strict=True)]
    with ThreadPoolExecutor(min(cores(), THREADS)) as pool:
        list(pool.map(search_coarse, _slabs(coarse_shape)))
        list(pool.map(search, _slabs(shape)))
    reached = error <= TOLERANCE_MM
    errors = InverseErrors(
        voxels=error.size,
        mean_mm=float(error[reached].mean()) if reached.any() else math.nan,
        max_mm=float(error[reached].max()) if reached.any() else math.nan,
        missed=int(np.count_nonzero(~reached)),
        missed_mm=float(error[~reached].max(initial=0)),
        outside=int(np.count_nonzero(outside & reached)),
        doubled=int(np.count_nonzero(doubled & reached)),
        folds=folds,
        probes=probes,
    )
    return itk.dense_field(displacement_mm, affine), errors


def points_back(
    transforms: Sequence[ItkTransform], points_mm: Float[np.ndarray, "P 3"]
) -> Float64[np.ndarray, "P 3"]:
    """The points x with `T(x) = y` for points y, RAS mm -> RAS mm; where there is none, as `invert` has it.

    Raises:
      InputError: as for `itk.understood`.
    """
    transforms = [itk.understood(transform) for transform in transforms]
    return _points(transforms, points_mm, np.zeros((len(points_mm), 3 * _grids(transforms))), POINT_MM)[0]


def _grids(transforms: Sequence[ItkTransform]) -> int:
    return sum(transform.type != itk.AFFINE for transform in transforms)


def _points(
    transforms: Sequence[ItkTransform],
    points_mm: Float[np.ndarray, "P 3"],
    guesses: Float64[np.ndarray, "P W"],
    search_mm: float,
) -> tuple[Float64[np.ndarray, "P 3"], Float64[np.ndarray, "P W"], Bool[np.ndarray, " P"], Bool[np.ndarray, " P"]]:
    """Where the transforms take points from (RAS mm), one transform after the other.

    Args:
      guesses: of what each grid's inverse adds to a point, three columns a grid.
      search_mm: how near a search is to come.

    Returns:
      The points; better guesses; whether a point lies outside a grid's domain; and whether one does too.
    """
    better = np.empty(guesses.shape)
    outside, doubled = np.zeros(len(points_mm), bool), np.zeros(len(points_mm), bool)
    column = 0
    for transform in transforms:
        if transform.type == itk.AFFINE:
            points_mm = geometry.voxel_to_world(points_mm, np.linalg.inv(itk.affine_matrix([transform])))
            continue
        columns = slice(column, column + 3)
        column += 3
        better[:, columns], error_mm = _search(transform, points_mm, guesses[:, columns], search_mm)
        found = points_mm + better[:, columns]
        # Outside its domain a grid moves nothing: a point there comes from itself, unless one inside comes to it.
        unmoved = ~itk.in_domain(transform, points_mm)
        inside = itk.in_domain(transform, found) & (error_mm <= TOLERANCE_MM)
        outside |= unmoved & ~inside
        doubled |= unmoved & inside
        points_mm = np.where((unmoved & ~inside)[:, None], points_mm, found)
    return points_mm, better, outside, doubled


def _search(
    transform: ItkTransform, points_mm: Float[np.ndarray, "P 3"], guess: Float64[np.ndarray, "P 3"], search_mm: float
) -> tuple[Float64[np.ndarray, "P 3"], Float64[np.ndarray, " P"]]:
    """w with `w + u(points + w) = 0` for the displacement u of a grid (RAS mm) that goes on beyond its domain; how far
    from 0 it is."""
    w = guess.copy()
    rest = -w - itk.continued_displacement(transform, points_mm + w)
    error_mm = np.linalg.norm(rest, axis=1)
    (active,) = np.nonzero(error_mm > search_mm)
    inverse = np.tile(np.eye(3), (active.size, 1, 1))  # of the derivative of w + u, as far as it is known
    longest = np.full(active.size, np.inf)  # of the next step
    for _ in range(ITERATIONS):
        if not active.size:
            break
        step = np.einsum("pij,pj->pi", inverse, rest[active])
        length = np.linalg.norm(step, axis=1)
        step *= np.minimum(1, longest / np.maximum(length, 1e-12))[:, None]
        there = w[active] + step
        rest_there = -there - itk.continued_displacement(transform, points_mm[active] + there)
        error_there = np.linalg.norm(rest_there, axis=1)
        nearer = error_there < error_mm[active]
        # Broyden's update; none where it would make the matrix singular.
        known = np.einsum("pij,pj->pi", inverse, rest[active] - rest_there)
        scale = np.einsum("pi,pi->p", step, known)
        scale[np.abs(scale) < 0.1 * np.einsum("pi,pi->p", step, step)] = np.inf
        inverse += ((step - known) / scale[:, None])[:, :, None] * np.einsum("pi,pij->pj", step, inverse)[:, None]
        taken = active[nearer]
        w[taken], rest[taken], error_mm[taken] = there[nearer], rest_there[nearer], error_there[nearer]
        # A step that leads no nearer is not taken, and the next one is shorter.
        longest = np.where(nearer, np.inf, 0.5 * np.linalg.norm(step, axis=1))
        going = error_mm[active] > search_mm
        active, inverse, longest = active[going], inverse[going], longest[going]
    return w, error_mm


def _folds(
    transforms: Sequence[ItkTransform], shape: tuple[int, int, int], affine: Num[np.ndarray, "4 4"]
) -> tuple[int, int]:
    """At how many cells of a lattice within the domains the transforms fold, and of how many; the lattice is taken to
    where the affine ones alone lead back."""
    back = np.linalg.inv(itk.affine_matrix([transform for transform in transforms if transform.type == itk.AFFINE]))
    places = geometry.voxel_to_world(_voxels(slice(0, shape[0]), shape), back @ affine)
    inside = np.ones(len(places), bool)
    for transform in reversed(transforms):
        if transform.type == itk.AFFINE:
            places = itk.apply([transform], places)
        else:
            inside &= itk.in_domain(transform, places)
            places = places + itk.continued_displacement(transform, places)
    places = geometry.world_to_voxel(places, affine).reshape(*shape, 3)
    first, inside = places[:-1, :-1, :-1], inside.reshape(shape)[:-1, :-1, :-1]
    edges = (places[1:, :-1, :-1], places[:-1, 1:, :-1], places[:-1, :-1, 1:])
    determinant = np.linalg.det(np.stack([edge - first for edge in edges], axis=-1))[inside]
    return int(np.count_nonzero(determinant <= 0)), determinant.size


def _interpolation(coarse: int, fine: int) -> Float64[np.ndarray, "coarse fine"]:
    """Weights of cubic interpolation along an axis, from corner to corner."""
    places = np.linspace(0, coarse - 1, fine)[None]
    return np.array([ndimage.map_coordinates(unit, places, order=3, mode="mirror") for unit in np.eye(coarse)])


def _slabs(shape: tuple[int, int, int]) -> list[slice]:
    rows = max(1, POINTS // math.prod(shape[1:]))
    return [slice(first, min(first + rows, shape[0])) for first in range(0, shape[0], rows)]


def _voxels(rows: slice, shape: tuple[int, int, int]) -> Float64[np.ndarray, "P 3"]:
    axes = (np.arange(rows.start, rows.stop), *map(np.arange, shape[1:]))
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3).astype(np.float64)
