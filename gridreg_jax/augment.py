"""Random affine, elastic and intensity changes of training pairs: a pure function of keys, compiled."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gridreg_jax.transforms.interpolation import interpolate
from gridreg_jax.transforms.warp import identity_grid, sample


def augment(
    batch: dict[str, jax.Array],
    keys: jax.Array,
    *,
    flip: float = 0.0,
    affine: float = 0.0,
    shift: float = 0.0,
    elastic: float = 0.0,
    contrast: float = 0.0,
    noise: float = 0.0,
    growth: float | Float[Array, ""] = 1.0,
) -> dict[str, jax.Array]:
    """A changed batch: fixed and moving each get a change of their own, and the pair may be mirrored as a whole.

    Source: the elastic map, Ronneberger et al., MICCAI 2015; affine and smooth gain, Billot et al., Medical Image
    Analysis 2023; mirroring, gamma and noise, Isensee et al., Nature Methods 2021. What names no unit has none.

    Args:
      batch: `fixed`, `moving` `[N, X, Y, Z, 1]`, optionally `fixed_labels`, `moving_labels` `[N, X, Y, Z]`, and
        `points` `[N, K, 3]` (voxels) of both images; these come back as `fixed_points` and `moving_points`, where they
        lie in the changed images if `elastic` is 0.
      keys: `[N]`, one an example, so that the result does not depend on how examples are spread over devices.
      flip: probability that a pair is mirrored along axis 0 (left and right).
      affine: standard deviation of the entries of the linear part (turn, scale and shear), about the middle.
      shift: standard deviation of the translation (voxels).
      elastic: standard deviation (voxels) of the control points of an elastic map on a 6x6x6 cubic grid.
      contrast: standard deviation of log gamma, of log gain and of the amplitude of a smooth log gain field.
      noise: standard deviation of white noise, intensities being in [0, 1].
      growth: factor of `affine`, `shift` and `elastic`.
    """

    def one(key, example):
        key_flip, *key_sides = jax.random.split(key, 3)
        mirrored = jax.random.uniform(key_flip) < flip
        changed = {}
        for key_side, name in zip(key_sides, ("fixed", "moving"), strict=True):
            volume = example[name]
            key_space, key_intensity = jax.random.split(key_side)
            strengths = (growth * strength for strength in (affine, shift, elastic))
            points, linear, translation = _random_points(key_space, volume.shape[:3], *strengths)
            points = points.at[..., 0].set(jnp.where(mirrored, volume.shape[0] - 1 - points[..., 0], points[..., 0]))
            changed[name] = _random_intensities(key_intensity, sample(volume, points), contrast, noise)
            if f"{name}_labels" in example:
                changed[f"{name}_labels"] = _nearest(example[f"{name}_labels"], points)
            if "points" in example:
                known, size = example["points"], volume.shape[:3]
                known = known.at[:, 0].set(jnp.where(mirrored, size[0] - 1 - known[:, 0], known[:, 0]))
                middle = _middle(size)
                changed[f"{name}_points"] = middle + jnp.linalg.solve(linear, (known - middle - translation).T).T
        return changed

    return jax.vmap(one)(keys, batch)


def _random_points(key, shape, affine, shift, elastic):
    """Where each voxel of a changed image is taken from, and the linear part, about the middle, and shift of that."""
    key_linear, key_shift, key_elastic = jax.random.split(key, 3)
    change = affine * jax.random.normal(key_linear, (3, 3))
    translation = shift * jax.random.normal(key_shift, (3,))
    control_grid = elastic * jax.random.normal(key_elastic, (1, 6, 6, 6, 3))
    grid = identity_grid(shape)
    points = grid + (grid - _middle(shape)) @ change.T + translation
    return points + interpolate(control_grid, shape, method="bspline")[0], jnp.eye(3) + change, translation


def _middle(shape) -> Float[Array, "3"]:
    return (jnp.asarray(shape, jnp.float32) - 1) / 2


def foreground_points(key: jax.Array, volume: Float[Array, "X Y Z 1"], count: int) -> Float[Array, "K 3"]:
    """Random voxels, all different, brighter than the volume is on average (as long as there are that many).

    Voxel coordinates. Source: the points of KeyMorph's pre-training, after its authors' code; the choice by brightness
    is this library's.
    """
    order = jax.random.uniform(key, volume.shape) + (volume > volume.mean())
    _, chosen = jax.lax.top_k(order.ravel(), count)
    return jnp.stack(jnp.unravel_index(chosen, volume.shape[:3]), axis=-1).astype(jnp.float32)


def _random_intensities(key, volume, contrast, noise) -> Float[Array, "X Y Z 1"]:
    key_gamma, key_gain, key_field, key_noise = jax.random.split(key, 4)
    gamma = jnp.exp(contrast * jax.random.normal(key_gamma))
    gain = jnp.exp(contrast * jax.random.normal(key_gain))
    field = jnp.exp(contrast * interpolate(jax.random.normal(key_field, (1, 4, 4, 4, 1)), volume.shape[:3])[0])
    volume = volume**gamma * gain * field
    return volume + noise * jax.random.normal(key_noise, volume.shape)


def _nearest(labels: Int[Array, "X Y Z"], points: Float[Array, "x y z 3"]) -> Int[Array, "x y z"]:
    index = [jnp.clip(jnp.round(points[..., a]), 0, n - 1).astype(jnp.int32) for a, n in enumerate(labels.shape)]
    return labels[tuple(index)]
