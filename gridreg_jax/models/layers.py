"""Blocks that models share: convolution, feature encoder, position encoding, changes of lattice, cross-attention."""

import functools
import importlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from gridreg_jax.attention import window_attention
from gridreg_jax.conv import conv3d
from gridreg_jax.errors import InputError, check_known
from gridreg_jax.transforms.interpolation import interpolate
from gridreg_jax.transforms.warp import integrate

# Angular frequencies per unit of normalised position, at most 3 pi: control points of the smallest grid (4 an axis) are
# 1/3 apart, so no frequency turns by more than pi between neighbours and none aliases, whatever the grid size.
FREQUENCIES = np.pi * np.array([0.5, 1.0, 2.0, 3.0])
# Width multiplier of each encoder level, the schedule that agrees with the paper's Table 2.
WIDTHS = (1, 2, 2, 4, 4, 8, 8, 16, 16)
# What `jax.checkpoint` knows the results of convolutions by.
CONVOLUTION = "convolution"


class Conv3D(nn.Module):
    """Convolution: `features` outputs, odd cubic kernel, zero padding; He initialisation, which suits a rectifier.

    Source: of the initialisation, He et al., ICCV 2015; of the convolution, see `conv3d`. `stride` is in voxels.

    Attributes:
      normed: an instance norm follows, which would take the bias away again: it is a parameter, but not added.
      in_loop: of `conv3d`.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    use_bias: bool = True
    normed: bool = False
    in_loop: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Float[Array, "N X Y Z C"]) -> Float[Array, "N x y z D"]:
        shape = (self.kernel_size,) * 3 + (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        x = conv3d(x, kernel.astype(x.dtype), stride=self.stride, in_loop=self.in_loop)
        x = checkpoint_name(x, CONVOLUTION)
        if not self.use_bias:
            return x
        bias = self.param("bias", self.bias_init, (self.features,))
        return x if self.normed else x + bias.astype(x.dtype)


def instance_norm(x: Float[Array, "N X Y Z C"], *, epsilon: float = 1e-5) -> Float[Array, "N X Y Z C"]:
    """Zero mean and unit variance of every channel of every sample over its voxels, no parameters; in the type of x.

    The result has no unit. Source: Ulyanov et al., Instance normalization, arXiv 1607.08022, 2016.
    """
    values = x.astype(jnp.float32)
    mean = values.mean(axis=(1, 2, 3), keepdims=True)
    variance = jnp.square(values - mean).mean(axis=(1, 2, 3), keepdims=True)
    return ((values - mean) * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)


def pad_to_multiple(x: Float[Array, "N X Y Z C"], multiple: int) -> Float[Array, "N x y z C"]:
    """Zeros at the far end of every axis, up to the next multiple (voxels); `crop` takes them away."""
    return jnp.pad(x, [(0, 0), *((0, -size % multiple) for size in x.shape[1:4]), (0, 0)])


def crop(x: Float[Array, "N x y z C"], shape: tuple[int, int, int]) -> Float[Array, "N X Y Z C"]:
    """The near end of every axis: what `pad_to_multiple` began from."""
    return x[:, : shape[0], : shape[1], : shape[2]]


def flow_of_half(
    velocity: Float[Array, "N x y z 3"], shape: tuple[int, int, int], *, steps: int
) -> Float[Array, "N X Y Z 3"]:
    """Displacement of the flow of a velocity on the half lattice (in voxels of that), corners lying on corners.

    What comes back is in voxels of the lattice `shape`.

    Source: the authors' code of VoxelMorph, which takes two voxels for one, whatever the sizes.
    """
    return 2 * interpolate(integrate(velocity, steps=steps), shape)


class FeatureMap(NamedTuple):
    """Features of one level and where they lie: feature i sits at voxel `origin + stride * i` of the image.

    Stride and origin (voxels) are those of every axis, or three, one an axis.
    """

    features: Float[Array, "N x y z D"]
    stride: int | Sequence[int]
    origin: float | Sequence[float] = 0.0


class Encoder(nn.Module):
    """Multi-scale features of an image pair (paper, section 3.1, E^(l)).

    Each level: 3x3x3 convolution, instance norm, leaky ReLU; widths `width` x 1, 2, 2, 4, 4, 8, 8, 16, 16. The first
    `downsampled` levels halve the lattice: by a convolution of stride 2 as in the paper, or with `pooled` by maxima of
    2x2x2 blocks after a convolution of stride 1, as in the authors' code, with eight times the multiplications.
    """

    levels: int = 5
    width: int = 16
    downsampled: int = 4
    pooled: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "N X Y Z C"]) -> list[FeatureMap]:
        """Feature maps, fine to coarse.

        Raises:
          InputError: no levels, more than the schedule of widths has, or too few voxels to pool.
        """
        if not 1 <= self.levels <= len(WIDTHS):
            raise InputError(f"the encoder has 1 to {len(WIDTHS)} levels, not {self.levels}")
        pyramid, stride, origin = [], 1, 0.0
        for level in range(self.levels):
            halved = level < self.downsampled
            step = 2 if halved and not self.pooled else 1
            x = Conv3D(self.width * WIDTHS[level], stride=step, normed=True, name=f"level{level}")(x)
            x = nn.leaky_relu(instance_norm(x), 0.1)
            if halved and self.pooled:
                if min(x.shape[1:4]) < 2:
                    raise InputError(f"level {level} of the encoder cannot halve {x.shape[1:4]} features: fewer levels")
                x = nn.max_pool(x, (2, 2, 2), strides=(2, 2, 2))
                origin += stride / 2
            stride *= 2 if halved else 1
            pyramid.append(FeatureMap(x, stride, origin))
        return pyramid


ENCODERS = {"strided": Encoder, "pooled": functools.partial(Encoder, pooled=True)}


def build_encoder(encoder: str, **fields) -> nn.Module:
    """An encoder by its name in `ENCODERS`, or any other by its place, "package.module:Class".

    The paper calls its approach encoder-agnostic (section 7).

    Args:
      fields: `levels`, `width`, `downsampled` and the module's `name`. The class must accept them, and map
        `[N, X, Y, Z, 2]` to `levels` feature maps, fine to coarse.

    Raises:
      InputError: no such encoder.
    """
    if ":" not in encoder:
        check_known("model.encoder", encoder, [*ENCODERS, "package.module:Class"])
        return ENCODERS[encoder](**fields)
    module, _, attribute = encoder.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)(**fields)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"model.encoder: {encoder!r} cannot be used: {error}") from error


def position_encoding(positions: Sequence[np.ndarray]) -> np.ndarray:
    """Sines and cosines of normalised coordinates, and the coordinates themselves (paper, section 3.1, psi(R)).

    Args:
      positions: per axis, positions in [0, 1].

    Returns:
      `[gx, gy, gz, 27]` float32, a constant of the grid size.
    """
    axes = []
    for position in positions:
        phase = position[:, None] * FREQUENCIES
        axes.append(np.concatenate([2 * position[:, None] - 1, np.sin(phase), np.cos(phase)], axis=1))
    sizes = [len(position) for position in positions]
    parts = [
        np.broadcast_to(axis.reshape(*(-1 if d == i else 1 for d in range(3)), axis.shape[1]), (*sizes, axis.shape[1]))
        for i, axis in enumerate(axes)
    ]
    return np.concatenate(parts, axis=-1).astype(np.float32)


def feature_coordinates(
    level: FeatureMap, lattice: Sequence[np.ndarray], shape: tuple[int, int, int]
) -> list[np.ndarray]:
    """Points of a lattice in [0, 1] (the corner voxels of an image of `shape`) in coordinates of a level's features.

    In feature voxels. Source: where a `FeatureMap` says that its features lie.
    """
    axes = zip(lattice, shape, np.broadcast_to(level.origin, 3), np.broadcast_to(level.stride, 3), strict=True)
    return [(points * (size - 1) - origin) / stride for points, size, origin, stride in axes]


def resample_features(
    features: Float[Array, "N x y z C"], coordinates: Sequence[np.ndarray]
) -> Float[Array, "N gx gy gz C"]:
    """Features around the points of a lattice, by separable hat functions; in the unit of the features.

    Source: written for this library, where the paper flattens the features of a level (section 3.1).

    Args:
      coordinates: per axis, feature coordinates (in feature voxels) of the lattice points. A hat is as wide as the
        points are apart, at least one feature voxel: coarse features are interpolated, fine ones averaged.
    """
    for axis, points in enumerate(coordinates):
        size = features.shape[1 + axis]
        points = np.clip(points, 0, size - 1)
        width = max(1.0, (points[-1] - points[0]) / max(len(points) - 1, 1))
        weights = np.maximum(0, 1 - np.abs(points[:, None] - np.arange(size)) / width)
        weights = jnp.asarray(weights / weights.sum(axis=1, keepdims=True), features.dtype)
        features = jnp.moveaxis(jnp.tensordot(weights, features, axes=(1, 1 + axis)), 0, 1 + axis)
    return features


class CrossAttention(nn.Module):
    """Multi-head cross-attention from control points to tokens (paper, section 3.1).

    `window=0`: every control point attends to every token. `window=w` (odd): tokens must lie on the control grid,
    and a control point attends to the w x w x w tokens around it; a learned bias tells the neighbours apart.

    Raises:
      InputError: the heads cannot share the features, or a window that is neither 0 nor a positive odd number.
    """

    features: int
    heads: int = 4
    window: int = 3

    @nn.compact
    def __call__(
        self, queries: Float[Array, "N gx gy gz Q"], tokens: Float[Array, "N px py pz T"]
    ) -> Float[Array, "N gx gy gz D"]:
        if self.features % self.heads:
            raise InputError(f"{self.features} features cannot be shared by {self.heads} heads")
        if self.window and (self.window < 1 or self.window % 2 == 0):
            raise InputError(f"the attention window must be odd, or 0 (global), not {self.window}")
        query = nn.Dense(self.features, use_bias=False, name="query")(queries) * (self.heads / self.features) ** 0.5
        key = nn.Dense(self.features, use_bias=False, name="key")(tokens)
        value = nn.Dense(self.features, use_bias=False, name="value")(tokens)
        if self.window:
            bias = self.param("bias", _near_first, (self.window**3, self.heads))
            merged = window_attention(query, key, value, bias, self.window)
        else:
            merged = _attend_all(query, key, value, self.heads)
        return nn.Dense(self.features, name="out")(merged)


def _near_first(key, shape: tuple[int, int]) -> Float[Array, "W H"]:
    """Initial logits by place in the window: the first head sees its own cell alone, each next one looks wider.

    From equal weights a control point would first see the mean of all cells around it, and would have to learn to
    tell them apart.
    """
    del key  # the same for every seed
    window = round(shape[0] ** (1 / 3))
    distance = np.square(np.indices((window,) * 3).reshape(3, -1) - window // 2).sum(axis=0)
    return jnp.asarray(-8.0 * distance[:, None] / 4.0 ** np.arange(shape[1]), jnp.float32)


def _attend_all(query, key, value, heads: int):
    shape = query.shape
    query, key, value = (x.reshape(x.shape[0], -1, heads, x.shape[-1] // heads) for x in (query, key, value))
    weights = jax.nn.softmax(jnp.einsum("nghd,nphd->nhgp", query, key))
    return jnp.einsum("nhgp,nphd->nghd", weights, value).reshape(shape)
