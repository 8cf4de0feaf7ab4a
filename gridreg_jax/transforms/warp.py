"""Sampling a volume at displaced points (pull-back warping), and composing such maps.

Everything here is in voxels of the array it samples; a point outside is clamped to the border (border padding), so
a zero displacement is exactly the identity, at the border too.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from gridreg_jax.transforms.interpolation import check_grid_size, contract, interpolate, lattice_weights

# Voxels of a slab, all of a batch together: what is computed of it stays in the cache.
SLAB = 2**16


def identity_grid(shape: tuple[int, int, int]) -> Float[Array, "X Y Z 3"]:
    """Voxel coordinates of every voxel of a lattice, by definition: `grid[i, j, k] = (i, j, k)`."""
    axes = [jnp.arange(size, dtype=jnp.float32) for size in shape]
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)


def corners(points: Float[Array, "*P 3"], shape: tuple[int, int, int]):
    """The eight voxels around each point, with their trilinear weights (no unit).

    Source: the linear sampling of Jaderberg et al., Spatial transformer networks, NeurIPS 2015, in three dimensions.

    Args:
      points: voxel coordinates; clamped to the lattice.
      shape: the lattice (X, Y, Z).

    Returns:
      A list of eight `(index, weight)`: index `[*P]` int32 into the flattened lattice, weight `[*P]`; the weights of
      a point sum to 1. Only the weights depend differentiably on the points: no scatter appears in a gradient.
    """
    low, fraction = [], []
    for axis, size in enumerate(shape):
        place = points[..., axis]
        # Not `jnp.clip`, whose slope on the border is a half: a point there still moves its value.
        coordinate = jnp.where(place < 0, 0, jnp.where(place > size - 1, size - 1, place))
        # The last cell is closed on both sides, so that its upper corner exists; a single slice has no cell.
        cell = jnp.clip(jnp.floor(coordinate), 0, max(size - 2, 0))
        low.append(cell.astype(jnp.int32))
        fraction.append(coordinate - cell)
    strides = (shape[1] * shape[2], shape[2], 1)
    base = sum(cell * stride for cell, stride in zip(low, strides, strict=True))
    result = []
    for corner in range(8):
        bits = [(corner >> (2 - axis)) & 1 for axis in range(3)]
        offset = sum(b * stride for b, stride, size in zip(bits, strides, shape, strict=True) if size > 1)
        weight = 1.0
        for bit, part in zip(bits, fraction, strict=True):
            weight = weight * (part if bit else 1 - part)
        result.append((base + offset, weight))
    return result


def sample(volume: Num[Array, "X Y Z C"], points: Float[Array, "*P 3"]) -> Float[Array, "*P C"]:
    """Trilinear values of a volume at voxel coordinates, with border padding; in the unit of the volume.

    Source: the linear sampling of Jaderberg et al., Spatial transformer networks, NeurIPS 2015, in three dimensions.
    """
    return _sample(volume[None], *_apart(points[None]))[0]


def warp(
    volume: Num[Array, "N X Y Z C"],
    displacement: Float[Array, "N x y z 3"],
    *,
    origin: Sequence[int] = (0, 0, 0),
    stride: int = 1,
) -> Float[Array, "N x y z C"]:
    """Pull-back: `warped(x) = volume(x + displacement(x))`, trilinear, border padding; in the unit of the volume.

    Source: Yan et al., Medical Physics 2026, section 3.1 (W(M, T)); Jaderberg et al., NeurIPS 2015.

    Args:
      volume: what is sampled (the moving image).
      displacement: voxels, component c along axis c, on the fixed lattice (whose size may differ).
      origin: voxel of the volume in which the fixed lattice begins.
      stride: how many voxels of the volume one of the fixed lattice is.
    """
    return _sample(volume, *_places(_apart(displacement), origin, stride))


def _apart(field: Num[Array, "*P C"]) -> list[Num[Array, "*P"]]:
    """Its components, an array each: on the CPU, arrays with a short last axis take several times as long."""
    return [field[..., c] for c in range(field.shape[-1])]


def _places(displacement, origin=(0, 0, 0), stride=1):
    """Where voxels lie that are displaced by three arrays `[N, x, y, z]`, an array an axis."""
    lattice = (
        (first + stride * jnp.arange(size, dtype=jnp.float32)).reshape([-1 if a == axis else 1 for a in range(3)])
        for axis, (first, size) in enumerate(zip(origin, displacement[0].shape[1:], strict=True))
    )
    return [component + place for component, place in zip(displacement, lattice, strict=True)]


def warp_by_grid(
    volumes: Sequence[Num[Array, "N X Y Z"]],
    control_grid: Float[Array, "N gx gy gz 3"],
    shape: tuple[int, int, int],
    *,
    method: str = "trilinear",
) -> list[Float[Array, "N x y z"]]:
    """Each volume warped by `interpolate(control_grid, shape)`, whose gradient needs no dense displacement.

    On the CPU the gradient is computed slab by slab across axis 0: what a slab needs stays in the cache, and the memory
    for displacements, weights and their gradients is that of a slab. What comes back has the units of the volumes.

    Source: Yan et al., Medical Physics 2026, sections 3.1 (warp) and 3.2 (interpolation); the slabs are this library's.

    Args:
      volumes: what is sampled (moving images, maps of labels), on one lattice.
      control_grid: displacement of the control points, voxels.
      shape: of the fixed lattice.
      method: a name in `INTERPOLATORS`.

    Raises:
      InputError: unknown method, or too few control points along an axis.
    """
    check_grid_size(control_grid.shape[1:4], method)
    volumes = [volume.astype(jnp.promote_types(volume.dtype, jnp.float32)) for volume in volumes]
    return jax.lax.platform_dependent(
        control_grid,
        *volumes,
        cpu=functools.partial(_warp_on_cpu, shape, method),
        default=functools.partial(_warp_densely, shape, method),
    )


def _warp_densely(shape, method, control_grid, *volumes):
    displacement = interpolate(control_grid, shape, method=method)
    return [warp(volume[..., None], displacement)[..., 0] for volume in volumes]


_warp_on_cpu = jax.custom_vjp(_warp_densely, nondiff_argnums=(0, 1))


def _warp_forward(shape, method, control_grid, *volumes):
    return _warp_densely(shape, method, control_grid, *volumes), (control_grid, volumes)


def _warp_backward(shape, method, residuals, gradients):
    control_grid, volumes = residuals
    slabs, coordinates, split = _slabs(shape, method, control_grid, len(volumes[0]))

    def add(total, parts):
        slab, gradients = parts
        places, to_grid = jax.vjp(lambda control_grid: coordinates(control_grid, slab), control_grid)
        pairs = list(zip(volumes, gradients, strict=True))
        slopes = [sum(gradient * _trilinear(volume, places, axis) for volume, gradient in pairs) for axis in range(3)]
        return total + to_grid(slopes)[0], None

    d_control_grid, _ = jax.lax.scan(add, jnp.zeros_like(control_grid), (slabs, [split(g) for g in gradients]))
    # Nothing of it is computed unless it is asked for.
    (_, *d_volumes) = jax.vjp(functools.partial(_warp_densely, shape, method), control_grid, *volumes)[1](gradients)
    return d_control_grid, *d_volumes


_warp_on_cpu.defvjp(_warp_forward, _warp_backward)


def _slabs(shape, method, control_grid, cases: int):
    """A lattice cut across axis 0 into slabs.

    Returns:
      What `lax.map` goes through; from it and a control grid to the coordinates of a slab's voxels, an array an axis;
      and from `[N, X, ...]` to slabs `[slabs, N, x, ...]`.
    """
    weights = lattice_weights(control_grid.shape[1:4], shape, method)
    most = max(1, SLAB // (cases * shape[1] * shape[2]))
    thickness = max(planes for planes in range(1, shape[0] + 1) if shape[0] % planes == 0 and planes <= most)
    rows = jnp.asarray(weights[0], control_grid.dtype).reshape(-1, thickness, control_grid.shape[1])
    first = thickness * jnp.arange(len(rows), dtype=jnp.float32)

    def coordinates(control_grid, slab):
        first, rows = slab
        x, y, z = _places(_apart(contract(control_grid, [rows, *weights[1:]])))
        return [first + x, y, z]

    def split(values):
        return jnp.moveaxis(values.reshape(cases, -1, thickness, *values.shape[2:]), 1, 0)

    return (first, rows), coordinates, split


def _sample(volume, *coordinates):
    """Values of `[N, X, Y, Z, C]` at the coordinates `[N, ...]`, one array an axis."""
    volume = volume.astype(jnp.promote_types(volume.dtype, jnp.float32))
    return jnp.stack([sample_channel(channel, *coordinates) for channel in _apart(volume)], axis=-1)


@jax.custom_vjp
def sample_channel(volume: Float[Array, "N X Y Z"], *coordinates: Float[Array, "N ..."]) -> Float[Array, "N ..."]:
    """As `sample`, of one channel of a batch at points whose three coordinates (voxels) are an array each.

    Source: Jaderberg et al., Spatial transformer networks, NeurIPS 2015.
    """
    return _trilinear(volume, coordinates)


def _trilinear(volume, coordinates, derivative: int | None = None):
    """Values of `[N, X, Y, Z]` at coordinates `[N, ...]`, or their derivative for one of the three coordinates."""
    sizes = volume.shape[1:]
    strides = (sizes[1] * sizes[2], sizes[2], 1)
    base = jnp.arange(len(volume)).reshape(-1, *[1] * (coordinates[0].ndim - 1)) * (sizes[0] * strides[0])
    weights = []
    for axis, (coordinate, size, stride) in enumerate(zip(coordinates, sizes, strides, strict=True)):
        clamped = jnp.clip(coordinate, 0, size - 1)
        # The last cell is closed on both sides, so that its upper corner exists; a single slice has no cell. Clipped
        # as a whole number, so that not even a NaN leads outside.
        low = jnp.clip(clamped.astype(jnp.int32), 0, max(size - 2, 0))
        base += low * stride
        fraction = clamped - low
        if axis == derivative:  # a clamped coordinate does not move its value
            inside = ((coordinate >= 0) & (coordinate <= size - 1)).astype(clamped.dtype)
            weights.append((-inside, inside))
        else:
            weights.append((1 - fraction, fraction))
    flat = volume.ravel()

    def along(axis, offset):
        if axis == 3:
            return flat.at[base + offset].get(mode="promise_in_bounds")
        step = strides[axis] if sizes[axis] > 1 else 0
        low, high = weights[axis]
        return along(axis + 1, offset) * low + along(axis + 1, offset + step) * high

    return along(0, 0)


def _sample_channel_forward(volume, *coordinates):
    return _trilinear(volume, coordinates), (volume, coordinates)


def _sample_channel_backward(residuals, gradient):
    volume, coordinates = residuals
    # The corners are gathered again, which is cheaper than keeping them. On the CPU for each derivative, in a loop:
    # unrolled, XLA would find that the derivatives share them, and keep them.
    derivatives = [lambda axis=axis: gradient * _trilinear(volume, coordinates, axis) for axis in range(3)]
    slopes = jax.lax.platform_dependent(
        cpu=lambda: jax.lax.map(lambda axis: jax.lax.switch(axis, derivatives), jnp.arange(3)),
        default=lambda: jnp.stack([derivative() for derivative in derivatives]),
    )
    (d_volume,) = jax.vjp(lambda volume: _trilinear(volume, coordinates), volume)[1](gradient)
    return d_volume, *(slope.astype(c.dtype) for slope, c in zip(slopes, coordinates, strict=True))


sample_channel.defvjp(_sample_channel_forward, _sample_channel_backward)


def warp_labels(labels: Num[Array, "N X Y Z"], displacement: Float[Array, "N x y z 3"]) -> Num[Array, "N x y z"]:
    """Warp a label map: each voxel takes the label with the largest sum of trilinear weights (a linear vote).

    Smoother than the nearest neighbour, and it never invents a label. Ties go to the smaller corner index.
    The displacement is in voxels; the labels are ids, without unit.

    Source: Schaerer et al., A generic interpolator for multi-label images, Insight Journal 2014, with linear weights.
    """

    def one(volume, points):
        flat = volume.reshape(-1)
        found = [(flat[index], weight) for index, weight in corners(points, volume.shape)]
        best, best_votes = found[0][0], jnp.full(found[0][0].shape, -1.0)
        for label, _ in found:
            votes = sum(jnp.where(other == label, weight, 0.0) for other, weight in found)
            better = votes > best_votes + 1e-6
            best, best_votes = jnp.where(better, label, best), jnp.where(better, votes, best_votes)
        return best

    return jax.vmap(one)(labels, identity_grid(displacement.shape[1:4]) + displacement)


def compose(outer: Float[Array, "N X Y Z 3"], inner: Float[Array, "N X Y Z 3"]) -> Float[Array, "N X Y Z 3"]:
    """Displacement of `outer` after `inner`: `u(x) = inner(x) + outer(x + inner(x))`, all in voxels.

    Source: the definition of the composition of two maps, written in displacements.
    """
    return inner + warp(outer, inner)


def half_lattice(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Voxels an axis at half the resolution, rounded up, as convolutions of stride 2 have it."""
    return tuple(-(-size // 2) for size in shape)


def integrate(velocity: Float[Array, "N X Y Z 3"], *, steps: int = 7) -> Float[Array, "N X Y Z 3"]:
    """Displacement of the flow of a stationary velocity field at time 1, by scaling and squaring.

    As many as 2**steps Euler steps. Velocity and displacement are in voxels. Source: Arsigny et al., MICCAI 2006.
    """

    def twice(_, u):
        places = _places(u)
        return [component + sample_channel(component, *places) for component in u]

    # A loop, not unrolled: XLA would fuse the chain of gathers into itself, and compile and run tens of times longer.
    return jnp.stack(jax.lax.fori_loop(0, steps, twice, _apart(velocity / 2**steps)), axis=-1)


def invert(
    displacement: Float[Array, "N X Y Z 3"],
    points: Float[Array, "N *P 3"],
    start: Float[Array, "N *P 3"],
    *,
    iterations: int = 30,
    relaxation: float = 1.0,
) -> Float[Array, "N *P 3"]:
    """Inverse displacement v with `v(y) + u(y + v(y)) = 0` at points y, by fixed-point iteration; all in voxels.

    Whole steps converge where `u` is a contraction (Lipschitz constant below 1), with that constant as their rate.

    Args:
      displacement: u.
      points: y.
      start: of v.
      iterations: how many.
      relaxation: the share of each step that is taken: less than 1 may converge where u stretches most.

    Source: Chen et al., Med. Phys. 2008.
    """
    u, y = _apart(displacement), _apart(points)

    def closer(_, v):
        places = [place + component for place, component in zip(y, v, strict=True)]
        return [
            inverse - relaxation * (inverse + sample_channel(component, *places))
            for inverse, component in zip(v, u, strict=True)
        ]

    return jnp.stack(jax.lax.fori_loop(0, iterations, closer, _apart(start)), axis=-1)
