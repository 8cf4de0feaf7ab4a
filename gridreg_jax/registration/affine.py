"""The affine start: the rotation, scale and shift that bring two images into each other's reach, in world space.

All lengths are relative to the images' size, so that a crop of 50 mm is treated as a head of 200 mm.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gridreg_jax import geometry
from gridreg_jax.data.nifti import Volume, corner_to_corner
from gridreg_jax.data.preprocess import center_of_mass, field_of_view, normalise, resample
from gridreg_jax.errors import InputError
from gridreg_jax.instance import descend
from gridreg_jax.losses import lncc, nmi
from gridreg_jax.programs import stored
from gridreg_jax.registration.mask import kept
from gridreg_jax.transforms.warp import identity_grid, sample_channel

# Voxels along every side, steps, and step size in the unit of the parameters (see `_matrix`). At the coarsest level
# every start is tried, and the best few go on.
LEVELS = ((12, 30, 0.05), (20, 40, 0.01), (40, 20, 0.004))
SURVIVORS = 4
# What it costs, in `losses.nmi`, if nothing of the fields of view overlaps: images mostly show the same part of a body.
OVERLAP = 0.04
TURN = np.pi / 6
# Share of the smaller of the two fields of view that must lie in the other.
LEAST_OVERLAP = 0.1


def align(
    fixed: Volume,
    moving: Volume,
    mask: Volume | None = None,
    *,
    kind: Literal["affine", "rigid"] = "affine",
) -> Float[np.ndarray, "4 4"]:
    """The affine or rigid map of most mutual information between two images, from no knowledge of how they lie.

    A short rigid search starts with the centres of mass on each other, with the middles of the fields of view on each
    other, and from the headers, each with turns of 30 degrees about the three axes. The best go on, coarse to fine.
    What lies outside the moving image's field of view does not count; that it lies there costs a little. Where the two
    have more local correlation by the headers than by what was found, the headers stand.

    Args:
      fixed, moving: images of any lattice.
      mask: where the fixed image counts (values other than 0); None: everywhere.
      kind: affine (12 parameters), or rigid (6).

    Returns:
      RAS mm of the fixed image -> RAS mm of the moving image.

    Raises:
      InputError: less than a tenth of the smaller field of view lies in the other one.
    """
    fixed, moving = (Volume(normalise(volume.array), volume.affine, volume.path) for volume in (fixed, moving))
    sides = [max(np.subtract(volume.array.shape, 1) * geometry.spacing(volume.affine)) for volume in (fixed, moving)]
    center, moving_center = (_center_of_mass(volume) for volume in (fixed, moving))
    radius = sides[0] / 4

    turns = np.concatenate([np.zeros((1, 3)), TURN * np.eye(3), -TURN * np.eye(3)])
    shifts = np.array([moving_center, _middle(moving) + center - _middle(fixed), center]) - moving_center
    parameters = np.array([[*shift / radius, *turn] for shift in shifts for turn in turns], np.float32)
    for number, (voxels, steps, learning_rate) in enumerate(LEVELS):
        # About one spacing for both, but a small part of a large image would make either lattice tiny or huge.
        counts = [voxels * round(min(3, side / min(sides))) for side in sides]
        fixed_level, moving_level = map(_of_size, (fixed, moving), counts)
        if number == 1 and kind == "affine":
            parameters = np.pad(parameters, [(0, 0), (0, 6)])
        to_moving = np.linalg.inv(moving_level.affine)
        weight = np.ones(fixed_level.array.shape, np.float32)
        if mask is not None:
            weight = kept(mask, fixed_level.affine, weight.shape)
        possible = min(1, _size_mm3(moving) / _size_mm3(fixed))
        losses, parameters = _search(
            fixed_level.array,
            moving_level.array,
            weight,
            ((fixed_level.affine[:3, :3] / radius), (fixed_level.affine[:3, 3] - center) / radius),
            (to_moving[:3, :3] * radius, geometry.voxel_to_world(moving_center, to_moving)),
            parameters,
            possible,
            learning_rate,
            steps=steps,
        )
        # A start that failed has a loss of NaN, and comes last.
        parameters = np.asarray(parameters)[np.argsort(losses)[: SURVIVORS if number == 0 else 1]]

    linear, shift = (np.asarray(part, np.float64) for part in jax.jit(_matrix)(parameters[0]))
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = moving_center + radius * shift - linear @ center
    check_overlap(fixed, moving, matrix)
    # Mutual information may gain a little where headers are right already; then their local correlation is higher.
    return min(matrix, np.eye(4), key=lambda matrix: _unlikeness(fixed_level, moving_level, weight, matrix))


def _unlikeness(fixed: Volume, moving: Volume, weight, matrix) -> float:
    """Of two images where both are known, by local correlation: 1 where nothing is."""
    shape = fixed.array.shape
    warped = resample(moving, matrix @ fixed.affine, shape)
    weight = weight * field_of_view(moving, matrix @ fixed.affine, shape)
    return float(_local_correlation(fixed.array[None, ..., None], warped[None, ..., None], weight[None])[0])


@stored
def _local_correlation(fixed, warped, weight):
    return lncc(fixed, warped, mask=weight)


def check_overlap(fixed: Volume, moving: Volume, matrix: Float[np.ndarray, "4 4"]) -> None:
    """Raise `InputError` if under `matrix` (fixed -> moving RAS mm) less than `LEAST_OVERLAP` of the smaller field of
    view lies in the other one."""
    # The middles of some thousand boxes into which the fixed field of view is cut.
    axes = [(np.arange(20) + 0.5) * size / 20 - 0.5 for size in fixed.array.shape]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    reached = geometry.world_to_voxel(geometry.voxel_to_world(points, matrix @ fixed.affine), moving.affine)
    inside = (np.abs(reached - (np.array(moving.array.shape) - 1) / 2) <= np.array(moving.array.shape) / 2).all(axis=-1)
    scaled_mm3 = _size_mm3(fixed) * abs(np.linalg.det(matrix[:3, :3]))
    share = inside.mean() * max(1, scaled_mm3 / _size_mm3(moving))
    if share < LEAST_OVERLAP:
        raise InputError(
            f"{fixed.path} and {moving.path} do not overlap: only {100 * share:.0f} % of the smaller field of view "
            "lies in the other one"
        )


@functools.partial(stored, static_argnames=("steps",))
def _search(fixed, moving, weight, to_points, to_voxels, starts, possible, learning_rate, *, steps):
    """The least loss from each start, and the parameters there.

    Args:
      weight: of the fixed voxels.
      to_points: linear part and shift, from fixed voxels to the coordinates in which the parameters act.
      to_voxels: the same from those coordinates to moving voxels.
      possible: share of the fixed lattice that can lie in the moving one.
    """
    points = _apply(to_points, list(jnp.moveaxis(identity_grid(fixed.shape), -1, 0)))

    def loss(parameters):
        reached = _apply(to_voxels, _apply(_matrix(parameters), points))
        # From 1 at the outermost voxel centres to 0 a voxel farther out, so that the overlap has a gradient too.
        distances = [jnp.minimum(place, size - 1 - place) for place, size in zip(reached, moving.shape, strict=True)]
        inside = math.prod(jnp.clip(1 + distance, 0, 1) for distance in distances)
        warped = sample_channel(moving[None], *(place[None] for place in reached))
        dissimilarity = nmi(fixed[None, ..., None], warped[..., None], mask=(weight * inside)[None])[0]
        overlap = jnp.mean(inside) / possible
        # A sliver can be alike by chance: less than half of what could overlap costs much.
        value = dissimilarity + OVERLAP * jnp.maximum(0, 1 - overlap) + jnp.maximum(0, 0.5 - overlap)
        return value, value

    def one(start):
        found, history = descend(loss, start, steps=steps, learning_rate=learning_rate)
        return jnp.nanmin(history), found

    return jax.vmap(one)(starts)


# What accelerators round to when they are not told would move points by tenths of a voxel.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _apply(transform, points: Sequence[Float[Array, "X Y Z"]]) -> list[Float[Array, "X Y Z"]]:
    """Linear part and shift of points, whose coordinates are an array each: one with a short last axis takes longer."""
    linear, shift = transform
    return [sum(linear[i, j] * place for j, place in enumerate(points)) + shift[i] for i in range(3)]


def _matrix(parameters: Float[Array, " P"]) -> tuple[Float[Array, "3 3"], Float[Array, "3"]]:
    """Linear part and shift: 3 for the shift, 3 for the rotation vector, then 3 logarithms of scales and 3 shears.

    Around the centre of mass, with a quarter of the longest side as unit of length: a change of any parameter by d
    moves points at that distance by about d.
    """
    shift, turn = parameters[:3], parameters[3:6]
    angle = jnp.sqrt(jnp.sum(turn**2) + 1e-12)
    x, y, z = turn / angle
    cross = jnp.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation = jnp.eye(3) + jnp.sin(angle) * cross + _matmul((1 - jnp.cos(angle)) * cross, cross)
    if len(parameters) == 6:
        return rotation, shift
    (a, b, c), (d, e, f) = jnp.exp(parameters[6:9]), parameters[9:]
    return _matmul(rotation, jnp.array([[a, d, e], [0, b, f], [0, 0, c]])), shift


def _of_size(volume: Volume, count: int) -> Volume:
    """The volume from corner to corner with so many voxels along every side, or its own where it has fewer."""
    shape = tuple(min(count, size) for size in volume.array.shape)
    affine = corner_to_corner(volume, shape)
    return Volume(resample(volume, affine, shape), affine, volume.path)


def _center_of_mass(volume: Volume) -> Float[np.ndarray, "3"]:
    return geometry.voxel_to_world(center_of_mass(volume.array), volume.affine)


def _middle(volume: Volume) -> Float[np.ndarray, "3"]:
    return geometry.voxel_to_world((np.array(volume.array.shape) - 1) / 2, volume.affine)


def _size_mm3(volume: Volume) -> float:
    return float(np.prod(volume.array.shape) * np.abs(np.linalg.det(volume.affine[:3, :3])))
