"""GridReg: a sparse control grid by cross-attention from multi-scale features (Yan et al., Medical Physics 2026)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from gridreg_jax.errors import InputError
from gridreg_jax.models.layers import CrossAttention, Encoder, local_norm, position_encoding, resample_features
from gridreg_jax.models.prediction import Prediction
from gridreg_jax.transforms.interpolation import (
    check_grid_size,
    control_positions,
    interpolate,
    interpolate_at_controls,
)
from gridreg_jax.transforms.warp import warp


class GridReg(nn.Module):
    """Encoder, skip projections, progressive cross-attention decoder and control-grid head.

    No weight has the grid size in its shape: one set of parameters serves every grid size.

    Attributes:
      levels, width, downsampled: the encoder's (see `layers.Encoder`); `levels` at least 4.
      skips: encoder levels that are projected to tokens after the bottom one, coarse to fine; of them, those above it.
      projection: width C_p of the tokens.  decoder: width C_d of the decoder state.  heads: attention heads.
      window: neighbouring grid cells an axis that a control point attends to; None: all tokens (global).
      tokens: with global attention, tokens an axis; memory does not depend on the image size.
      interpolator: "trilinear", "bspline" or "gaussian".
      contrast_window: voxels an axis (odd) of the box in which intensities are normalised before the encoder; 0: none.
      iterations: how often the network runs, each time on the moving image as it is warped so far; the control grids
        add up, so the map stays one control grid. 1 is the paper's network; more is an addition of this library.
    """

    levels: int = 5
    width: int = 16
    downsampled: int = 4
    skips: tuple[int, ...] = (3, 2, 1)
    projection: int = 32
    decoder: int = 32
    heads: int = 4
    window: int | None = 3
    tokens: int = 8
    interpolator: str = "trilinear"
    iterations: int = 1
    contrast_window: int = 0

    @nn.compact
    def __call__(
        self,
        fixed: Float[Array, "N X Y Z 1"],
        moving: Float[Array, "N X Y Z 1"],
        *,
        grid_size: tuple[int, int, int] = (10, 10, 10),
        train: bool = False,
    ) -> Prediction:
        """Predict the map from fixed to moving.

        Args:
          grid_size: control points an axis, static; at least 4 for the cubic spline.

        Raises:
          InputError: the grid size is too small for the interpolator.
        """
        del train  # nothing here differs between training and inference
        check_grid_size(grid_size, self.interpolator)
        if self.contrast_window and self.contrast_window % 2 == 0:
            raise InputError(f"model.contrast_window is {self.contrast_window}: give an odd number of voxels, or 0")
        if self.iterations < 1:
            raise InputError(f"model.iterations is {self.iterations}: give 1 or more")
        shape = fixed.shape[1:4]

        def refine(model: "GridReg", control_grid, _):
            # What was found so far is given, not revised: no gradient passes through the images that it warped.
            displacement = interpolate(jax.lax.stop_gradient(control_grid), shape, method=model.interpolator)
            return control_grid + model._increment(fixed, warp(moving, displacement), grid_size), None

        start = jnp.zeros((fixed.shape[0], *grid_size, 3), fixed.dtype)
        # A scan with shared weights: the network is compiled once, however often it runs.
        repeated = nn.scan(refine, variable_broadcast="params", split_rngs={"params": False}, length=self.iterations)
        control_grid, _ = repeated(self, start, None)
        return Prediction(
            displacement=interpolate(control_grid, shape, method=self.interpolator),
            control_grid=control_grid,
            control_displacement=interpolate_at_controls(control_grid, method=self.interpolator),
        )

    def _increment(self, fixed, moving, grid_size) -> Float[Array, "N gx gy gz 3"]:
        """Control grid of the map from fixed to moving, as far as one run of the network finds it."""
        shape = fixed.shape[1:4]
        images = jnp.concatenate([fixed, moving], axis=-1)
        if self.contrast_window:
            images = local_norm(images, self.contrast_window)
        pyramid = Encoder(self.levels, self.width, self.downsampled, name="encoder")(images)
        positions = [control_positions(self.interpolator, g) for g in grid_size]
        lattice = positions if self.window else [np.linspace(0, 1, self.tokens)] * 3
        tokens = jnp.stack([self._project(*pyramid[level], level, lattice, shape) for level in self._decoded])
        encoding, around = (self._encoding(points, fixed) for points in (positions, lattice))
        state = nn.Dense(self.decoder, name="start")(encoding)
        # A scan rather than four copies: the decoder is compiled once.
        decoder = nn.scan(
            DecoderLevel,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=len(tokens),
        )
        places = None
        if not self.window:
            places = [_locate(points, axis) for points, axis in zip(lattice, positions, strict=True)]
        state, _ = decoder(self.decoder, self.heads, self.window, places, name="decoder")(
            state, tokens, encoding, around
        )

        # Zero weights: the map starts at the identity. Normalised units, 1 = half the lattice, as in the paper.
        head = nn.Dense(3, kernel_init=nn.initializers.zeros_init(), name="head")(nn.LayerNorm(name="head_norm")(state))
        return head * jnp.asarray([(size - 1) / 2 for size in shape], head.dtype)

    @property
    def _decoded(self) -> tuple[int, ...]:
        """Encoder levels that the decoder visits, coarse to fine."""
        return (self.levels - 1, *(level for level in self.skips if level < self.levels - 1))

    def _project(self, features, stride, level, lattice, shape) -> Float[Array, "N px py pz C"]:
        """Skip projection: features of a level as tokens P^(l) on a lattice of points in [0, 1].

        Not the paper's linear one: products of features (an image difference times a gradient, say) are what tells a
        displacement, and averaging over a cell would leave nothing to multiply.
        """
        linear, left, right = jnp.split(nn.Dense(3 * self.projection, name=f"projection{level}")(features), 3, axis=-1)
        projected = linear + left * right
        return resample_features(
            projected, [points * (size - 1) / stride for points, size in zip(lattice, shape, strict=True)]
        )

    def _encoding(self, positions, like):
        encoding = jnp.asarray(position_encoding(positions), like.dtype)
        return jnp.broadcast_to(encoding, (like.shape[0], *encoding.shape))


class DecoderLevel(nn.Module):
    """One step of the progressive decoder: the state Y at the control points attends to the tokens [P, Y].

    Paper, section 3.1: Y^-(l-1) = g_dec([P^(l), Y^-(l)]), with queries from position encodings. Here the state joins
    the queries, and residual connections, layer norms and a two-layer perceptron surround the attention, as in
    transformers.

    Attributes:
      places: with global attention, where the tokens lie among the control points (fractional indices an axis).
    """

    features: int
    heads: int
    window: int | None
    places: Sequence[np.ndarray] | None

    @nn.compact
    def __call__(self, state, projected, encoding, around):
        """`state`, `encoding` on the control grid; `projected`, `around` (positions of the tokens) on theirs."""
        normed = nn.LayerNorm()(state)
        carried = normed if self.places is None else resample_features(normed, self.places)
        # Normed, a token holds ratios of what was averaged over its cell, whatever the contrast there.
        tokens = jnp.concatenate([nn.LayerNorm()(projected), carried, around], axis=-1)
        queries = jnp.concatenate([normed, encoding], axis=-1)
        state = state + CrossAttention(self.features, self.heads, self.window)(queries, tokens)
        hidden = nn.gelu(nn.Dense(2 * self.features)(nn.LayerNorm()(state)))
        return state + nn.Dense(self.features)(hidden), None


def _locate(points: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Coordinates of points in [0, 1] among increasing control positions (fractional indices)."""
    return np.interp(points, positions, np.arange(len(positions)))
