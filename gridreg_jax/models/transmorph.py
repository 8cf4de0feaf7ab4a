"""TransMorph: a Swin transformer on patches of two images, and a convolutional decoder to a map at every voxel.

Source: Chen et al., Medical Image Analysis 2022; sizes and order of operations from its authors' code.
docs/models.md says where this departs, and why.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Float64, Int, Shaped

from gridreg_jax.errors import InputError, check_known
from gridreg_jax.models.fields import check_fields
from gridreg_jax.models.layers import Conv3D, crop, flow_of_half, instance_norm, pad_to_multiple
from gridreg_jax.models.prediction import Prediction
from gridreg_jax.transforms.interpolation import contract, interpolate
from gridreg_jax.transforms.warp import half_lattice, integrate

PATCH = 4  # voxels an axis
STEPS = 7  # squarings of an integration
OUTPUTS = ("displacement", "bspline", "diffeomorphic")
# What PyTorch begins a linear layer with.
_LINEAR = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class TransMorph(nn.Module):
    """Encoder, decoder and head. The defaults are the authors' network, with 46 771 251 parameters.

    The displacement is in voxels. Source: Chen et al., Medical Image Analysis 2022.

    Attributes:
      embed: features of a patch; twice as many at each of the three coarser levels. Even.
      depths, heads: blocks, and attention heads, of the levels, fine to coarse.
      window: patches an axis that attend to each other. The authors let it divide the coarsest grid, a 32nd of the
        image.
      transformer_skips, convolution_skips: let the decoder see the encoder's finer levels, and convolutions of the
        images; without both it is the network in the GridReg paper's table (41 476 659 parameters).
      output: "displacement"; "bspline": a velocity, by cubic B-splines; "diffeomorphic": a velocity at half resolution,
        with a posterior from which training draws.
      spacing: voxels between control points, for "bspline".
      scaled: False: square the "diffeomorphic" velocity as it is, like the authors' code; True: divided by 2^7 first,
        so that the displacement is its flow.
      drop_path: share of the residual branches that training leaves out: from 0 in the first block to this in the last.
      dropout: share of the features that are left out wherever the random stream "dropout" is given.
      passes: how many predictions with dropout are averaged outside of training, the same for every call; 0: one,
        without dropout.
    """

    embed: int = 96
    depths: tuple[int, ...] = (2, 2, 4, 2)
    heads: tuple[int, ...] = (4, 4, 8, 8)
    window: tuple[int, int, int] = (5, 6, 7)
    transformer_skips: bool = True
    convolution_skips: bool = True
    output: str = "displacement"
    spacing: int = 3
    scaled: bool = True
    drop_path: float = 0.3
    dropout: float = 0.0
    passes: int = 0

    @property
    def example_streams(self) -> tuple[str, ...]:
        """Random streams of which training gives each example a key of its own."""
        drops = ("dropout",) if self.drop_path or self.dropout else ()
        return (*drops, "velocity") if self.output == "diffeomorphic" else drops

    @nn.compact
    def __call__(
        self,
        fixed: Float[Array, "N X Y Z 1"],
        moving: Float[Array, "N X Y Z 1"],
        *,
        grid_size: None = None,
        train: bool = False,
    ) -> Prediction:
        """Predict the map from fixed to moving, for images of any size.

        Args:
          grid_size: None; there is no control grid.
          train: leave out residual branches, and draw the velocity; needs the random streams in `example_streams`.

        Raises:
          InputError: a field is out of range.
        """
        self._check()
        if self.passes and not train and not self.is_initializing():
            return self._average(fixed, moving)
        shape = fixed.shape[1:4]
        images = pad_to_multiple(jnp.concatenate([moving, fixed], axis=-1), PATCH * 2 ** (len(self.depths) - 1))
        # Given or not, the stream decides: predictions that are averaged have dropout, but all of their branches.
        dropout = self.dropout if self.has_rng("dropout") else 0.0
        levels = self._encode(images, self.drop_path if train else 0.0, dropout)
        features = self._decode(levels, images, dropout)
        if self.output == "bspline":
            return self._spline(crop(features, half_lattice(shape)), shape)
        # The map starts at the identity, all but exactly.
        flow = Conv3D(3, kernel_init=nn.initializers.normal(1e-5), name="flow")(features)
        if self.output == "displacement":
            return Prediction(displacement=crop(flow, shape))

        small, low = nn.initializers.normal(1e-10), nn.initializers.constant(-10.0)
        log_variance = Conv3D(3, kernel_init=small, bias_init=low, name="log_variance")(features)
        mean, log_variance = (crop(field, half_lattice(shape)) for field in (flow, log_variance))
        velocity = mean
        if train:
            velocity += jnp.exp(0.5 * log_variance) * jax.random.normal(self.make_rng("velocity"), mean.shape)
        if not self.scaled:
            velocity *= 2**STEPS
        return Prediction(
            displacement=flow_of_half(velocity, shape, steps=STEPS), velocity=mean, velocity_log_variance=log_variance
        )

    def _check(self) -> None:
        check_known("model.output", self.output, OUTPUTS)
        if len(self.depths) != len(self.heads):
            raise InputError(f"model.depths has {len(self.depths)} levels and model.heads {len(self.heads)}")
        if not self.depths:
            raise InputError("model.depths is empty: give one level or more")
        if len(self.window) != 3:
            raise InputError(f"model.window is {self.window}: give the patches along three axes")
        check_fields(self, 1, "embed", "depths", "heads", "window", "spacing")
        check_fields(self, 0, "passes")
        check_fields(self, 0, "drop_path", "dropout", most=1)
        if self.embed % 2:
            raise InputError(f"model.embed is {self.embed}: give an even number")
        for level, heads in enumerate(self.heads):
            if self.embed * 2**level % heads:
                raise InputError(f"model.heads: {self.embed * 2**level} features cannot be shared by {heads} heads")
        if self.passes and not self.dropout:
            raise InputError("model.passes needs model.dropout: without it all passes are the same")

    def _average(self, fixed, moving) -> Prediction:
        """Mean and variance of the displacement over predictions with dropout."""
        once, params = self.clone(parent=None, passes=0), self.variables

        def draw(key):
            return once.apply(params, fixed, moving, rngs={"dropout": key}).displacement

        drawn = jax.lax.map(draw, jax.random.split(jax.random.key(0), self.passes))
        return Prediction(displacement=drawn.mean(0), variance=drawn.var(0))

    def _encode(self, images, drop_path: float, dropout: float) -> list[Float[Array, "N x y z D"]]:
        """Features of the levels, fine to coarse, patches first."""
        rates = iter(np.linspace(0, drop_path, sum(self.depths)))
        x = _norm("patch_norm")(nn.Dense(self.embed, kernel_init=_LINEAR, name="patches")(_cubes(images, PATCH)))
        levels = []
        for level, (depth, heads) in enumerate(zip(self.depths, self.heads, strict=True)):
            if level:
                x = _norm(f"merge{level}_norm")(_cubes(x, 2))
                x = nn.Dense(self.embed * 2**level, use_bias=False, kernel_init=_LINEAR, name=f"merge{level}")(x)
            for number in range(depth):
                # For the gradient, what is inside a block is computed anew: attention weights are large.
                block = nn.remat(SwinBlock)(
                    heads,
                    self.window,
                    bool(number % 2),
                    float(next(rates)),
                    dropout,
                    name=f"level{level}_block{number}",
                )
                x = block(x)
            levels.append(_norm(f"level{level}_norm")(x))
        return levels

    def _decode(self, levels, images, dropout: float) -> Float[Array, "N x y z D"]:
        """Features at full resolution for a displacement, at half of it otherwise."""
        *finer, x = levels
        half = nn.avg_pool(images, (3, 3, 3), strides=(2, 2, 2), padding=[(1, 1)] * 3)
        # As in the authors' code, what is no skip has its parameters all the same.
        skips = [(skip, self.transformer_skips) for skip in reversed(finer)]
        skips.append((self._convolve(half, self.embed // 2, "skip_half", dropout), self.convolution_skips))
        widths = [skip.shape[-1] for skip, _ in skips]
        if self.output == "displacement":
            skips.append((self._convolve(images, 16, "skip_full", dropout), self.convolution_skips))
            widths.append(16)
        elif self.output == "diffeomorphic":
            widths[-1] = 16
        for number, (features, (skip, joins)) in enumerate(zip(widths, skips, strict=True)):
            x = _upsampled(x)
            if joins:
                x = jnp.concatenate([x, skip], axis=-1)
            for part in "ab":
                x = self._convolve(x, features, f"decoder{number}{part}")
        return x

    def _convolve(self, x, features: int, name: str, dropout: float = 0.0) -> Float[Array, "N x y z D"]:
        x = nn.leaky_relu(instance_norm(Conv3D(features, use_bias=False, name=name)(x)), 0.01)
        return nn.Dropout(dropout, broadcast_dims=(1, 2, 3), deterministic=False, name=f"{name}_dropout")(x)

    def _spline(self, features, shape) -> Prediction:
        """Features at half resolution to a velocity by cubic B-splines, and its flow."""
        sizes = [math.ceil((size - 1) / self.spacing) + 3 for size in shape]
        x = interpolate(features, tuple(sizes))
        for number in range(2):
            x = nn.leaky_relu(Conv3D(32, name=f"control{number}")(x), 0.2)
        control_grid = Conv3D(3, kernel_init=_LINEAR, name="flow")(x)
        weights = [_spline_weights(n, size, self.spacing) for n, size in zip(sizes, shape, strict=True)]
        velocity = contract(control_grid, weights)
        return Prediction(displacement=integrate(velocity, steps=STEPS), velocity=velocity)


class SwinBlock(nn.Module):
    """Attention within windows, and a perceptron; residual, each after a layer norm.

    Source: Liu et al., Swin transformer, ICCV 2021, in three dimensions as by Chen et al., Medical Image Analysis 2022.

    Attributes:
      shifted: let the windows lie half their size further on, so that they look across the borders of the others'.
      drop_path, dropout: rates at which the branches, and features, are left out in this very call.
    """

    heads: int
    window: tuple[int, int, int]
    shifted: bool
    drop_path: float = 0.0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "N x y z C"]) -> Float[Array, "N x y z C"]:
        def drop(x, rate, **options):
            return nn.Dropout(rate, deterministic=False, **options)(x)

        def drop_branch(branch):
            return drop(branch, self.drop_path, broadcast_dims=(1, 2, 3, 4))

        attended = WindowAttention(self.heads, self.window, self.shifted, self.dropout, name="attention")(
            _norm("attention_norm")(x)
        )
        x = x + drop_branch(attended)
        hidden = nn.Dense(4 * x.shape[-1], kernel_init=_LINEAR, name="hidden")(_norm("hidden_norm")(x))
        hidden = drop(nn.gelu(hidden, approximate=False), self.dropout)
        out = drop(nn.Dense(x.shape[-1], kernel_init=_LINEAR, name="out")(hidden), self.dropout)
        return x + drop_branch(out)


class WindowAttention(nn.Module):
    """Multi-head self-attention among the cells of every window of a grid, with a bias for their relative positions.

    A grid that the windows do not divide is continued by zeros, which are attended to. Shifted windows wrap around the
    grid; cells that are not neighbours there do not see each other.

    Source: Liu et al., Swin transformer, ICCV 2021.

    Attributes:
      window: cells an axis.
      shifted: by half a window.
      dropout: rate for weights and results in this very call.
    """

    heads: int
    window: tuple[int, int, int]
    shifted: bool
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "N x y z C"]) -> Float[Array, "N x y z C"]:
        grid, channels = x.shape[1:4], x.shape[-1]
        shift = tuple(size // 2 if self.shifted else 0 for size in self.window)
        x = jnp.pad(x, [(0, 0), *((0, -n % w) for n, w in zip(grid, self.window, strict=True)), (0, 0)])
        padded = x.shape[1:4]
        x = _windows(jnp.roll(x, [-s for s in shift], (1, 2, 3)), self.window)
        x = nn.Dense(3 * channels, use_bias=False, kernel_init=_LINEAR, name="query_key_value")(x)
        query, key, value = jnp.moveaxis(x.reshape(*x.shape[:-1], 3, self.heads, -1), 3, 0)
        logits = jnp.einsum("nwthd,nwshd->nwhts", query * query.shape[-1] ** -0.5, key)

        cells = tuple(2 * size - 1 for size in self.window)
        bias = self.param("bias", nn.initializers.truncated_normal(0.02), (math.prod(cells), self.heads))
        logits += jnp.moveaxis(bias[_relative_positions(self.window)], -1, 0)
        if self.shifted:
            regions = jnp.asarray(_regions(padded, self.window, shift))
            logits += jnp.where(regions[:, :, None] == regions[:, None, :], 0.0, -100.0)[:, None]
        weights = nn.Dropout(self.dropout, deterministic=False)(jax.nn.softmax(logits))
        x = jnp.einsum("nwhts,nwshd->nwthd", weights, value)
        x = nn.Dense(channels, kernel_init=_LINEAR, name="out")(x.reshape(*x.shape[:3], channels))
        x = nn.Dropout(self.dropout, deterministic=False)(x)
        return crop(jnp.roll(_joined(x, padded, self.window), shift, (1, 2, 3)), grid)


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, name=name)


def _cubes(x: Float[Array, "N X Y Z C"], size: int) -> Float[Array, "N x y z D"]:
    """The voxels of every cube of `size` an axis, one after the other in the features."""
    cells = tuple(n // size for n in x.shape[1:4])
    return _windows(x, (size,) * 3).reshape(x.shape[0], *cells, -1)


def _windows(
    x: Shaped[Array | np.ndarray, "N X Y Z C"], window: tuple[int, int, int]
) -> Shaped[Array | np.ndarray, "N W T C"]:
    """The cells of every window, which must divide the grid."""
    n, (a, b, c), channels = x.shape[0], window, x.shape[-1]
    x = x.reshape(n, x.shape[1] // a, a, x.shape[2] // b, b, x.shape[3] // c, c, channels)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(n, -1, a * b * c, channels)


def _joined(
    x: Float[Array, "N W T C"], grid: tuple[int, int, int], window: tuple[int, int, int]
) -> Float[Array, "N X Y Z C"]:
    """The grid that `_windows` was taken from."""
    counts = tuple(size // w for size, w in zip(grid, window, strict=True))
    x = x.reshape(x.shape[0], *counts, *window, x.shape[-1])
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(x.shape[0], *grid, x.shape[-1])


def _relative_positions(window: tuple[int, int, int]) -> Int[np.ndarray, "T T"]:
    """For every two cells of a window, a number for where one lies as seen from the other."""
    cells = np.indices(window).reshape(3, -1)
    apart = cells[:, :, None] - cells[:, None, :] + np.array(window)[:, None, None] - 1
    return np.ravel_multi_index(apart, [2 * size - 1 for size in window])


def _regions(
    grid: tuple[int, int, int], window: tuple[int, int, int], shift: tuple[int, int, int]
) -> Int[np.ndarray, "W T"]:
    """Which of the 27 parts, that lie apart in the grid before it is shifted, the cells of every window are from."""
    axes = []
    for size, w, s in zip(grid, window, shift, strict=True):
        place = np.arange(size)
        axes.append((place >= size - w).astype(np.int32) + (place >= size - s))
    regions = np.ravel_multi_index(np.meshgrid(*axes, indexing="ij"), (3, 3, 3)).astype(np.int32)
    return _windows(regions[None, ..., None], window)[0, ..., 0]


def _upsampled(x: Float[Array, "N X Y Z C"]) -> Float[Array, "N x y z C"]:
    """Twice as many voxels an axis, linear: the centres of a voxel's two halves are a quarter away from its own."""
    for axis in (1, 2, 3):
        first, last = (jax.lax.slice_in_dim(x, at, at + 1, axis=axis) for at in (0, x.shape[axis] - 1))
        before = jnp.concatenate([first, jax.lax.slice_in_dim(x, 0, -1, axis=axis)], axis)
        after = jnp.concatenate([jax.lax.slice_in_dim(x, 1, None, axis=axis), last], axis)
        halves = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
        x = halves.reshape(*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
    return x


def _spline_weights(controls: int, size: int, spacing: int) -> Float64[np.ndarray, "size controls"]:
    """Uniform cubic B-splines at the voxels of an axis; control k lies at voxel `spacing (k - 1)`."""
    apart = np.abs(np.arange(size)[:, None] / spacing - (np.arange(controls) - 1))
    return np.where(apart < 1, 2 / 3 - apart**2 + apart**3 / 2, np.maximum(2 - apart, 0) ** 3 / 6)
