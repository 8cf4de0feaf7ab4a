"""GridReg: a sparse control grid by cross-attention from multi-scale features (Yan et al., Medical Physics 2026)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from gridreg_jax.conv import local_norm
from gridreg_jax.errors import InputError, check_known
from gridreg_jax.losses import normalised_residual
from gridreg_jax.models.fields import check_fields
from gridreg_jax.models.layers import (
    CrossAttention,
    FeatureMap,
    build_encoder,
    feature_coordinates,
    position_encoding,
    resample_features,
)
from gridreg_jax.models.prediction import Prediction, label_probabilities
from gridreg_jax.models.segmenter import Segmenter
from gridreg_jax.transforms.interpolation import (
    check_grid_size,
    control_positions,
    interpolate,
    interpolate_at_controls,
    interpolate_variance,
)
from gridreg_jax.transforms.warp import warp, warp_by_grid


class GridReg(nn.Module):
    """Encoder, skip projections, progressive cross-attention decoder and control-grid head.

    No weight has the grid size in its shape: one set of parameters serves every grid size.

    Attributes:
      encoder: name in `layers.ENCODERS` or "package.module:Class" (see `layers.build_encoder`).
      levels, width, downsampled: the encoder's (see `layers.Encoder`).
      skips: encoder levels that are projected to tokens after the bottom one, coarse to fine; of them, those above it.
        Empty: no skip projections (the paper's ablation).
      projection: width C_p of the tokens.  decoder: width C_d of the decoder state.  heads: attention heads.
      products: let tokens hold products of features; False: the paper's linear projection.
      window: neighbouring grid cells an axis that a control point attends to; 0: all tokens (global); 1: its own
        cell alone, which is no attention at all (an ablation).
      tokens: with global attention, tokens an axis; memory does not depend on the image size.
      interpolator: "trilinear", "bspline" or "gaussian".
      bound: largest displacement that one run of the network gives a control point, in half lattices (the paper's tanh
        has 1); 0: free.
      bayesian: also give the log variance of every control point (paper, section 3.2, Bayesian grid transformer).
      variance: where that comes from: "observed", what the images say it is where the map leaves them
        (`_observed_variance`), on a scale that training finds; or "predicted" from the features of the control point,
        as in the paper.
      contrast_window: voxels an axis (odd) of the box in which intensities are normalised before the encoder; 0: none.
      iterations: how often the network runs, each time on the moving image as it is warped so far; the control grids
        add up, so the map stays one control grid. 1 is the paper's network; more is an addition of this library. In
        training, as many runs as a draw of the stream "iterations" says come first and are taken as given, and the
        gradient is that of one more: every run learns to be the last.
      segmenter: features of a segmenter at half the resolution; 0: none. It predicts the labels of each image by itself
        (`Segmenter`), taught by those of the training images; the encoder sees its probabilities beside the images, and
        so does the instance optimisation. For few labels: memory grows with them. Not in the paper.
      labels: how many it predicts beside the background; training sets it to those of the data.
      precision: of the encoder, nearly all of the arithmetic: "float32", or "bfloat16" for accelerators. Parameters,
        statistics, and whatever follows the encoder stay in float32.
    """

    encoder: str = "strided"
    levels: int = 5
    width: int = 16
    downsampled: int = 4
    skips: tuple[int, ...] = (3, 2, 1)
    projection: int = 32
    products: bool = True
    decoder: int = 32
    heads: int = 4
    window: int = 3
    tokens: int = 8
    interpolator: str = "trilinear"
    bound: float = 0.0
    bayesian: bool = False
    variance: str = "observed"
    iterations: int = 1
    contrast_window: int = 0
    segmenter: int = 0
    labels: int = 0
    precision: str = "float32"

    @property
    def runs_foreign_code(self) -> bool:
        """Whether the encoder is a class from elsewhere (see `programs.stored`)."""
        return ":" in self.encoder

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
          train: with more than one iteration, draw how many; needs the random stream "iterations".

        Raises:
          InputError: the grid size is too small for the interpolator, or a field is out of range.
        """
        check_grid_size(grid_size, self.interpolator)
        self._check_fields()
        shape = fixed.shape[1:4]
        segmentation, seen = None, (fixed, moving)
        if self.segmenter:
            fields = dict(width=self.segmenter, contrast_window=self.contrast_window)
            logits = Segmenter(self.labels, **fields, name="segmenter")(jnp.concatenate([fixed, moving]))
            segmentation = tuple(jnp.split(logits, 2))
            # The segmenter learns from labels alone: what it tells stays a probability of them.
            maps = (jax.lax.stop_gradient(label_probabilities(logits)) for logits in segmentation)
            seen = tuple(jnp.concatenate(both, axis=-1) for both in zip(seen, maps, strict=True))

        def run(found, network):
            # What was found so far is given, not revised: no gradient passes through the images that it warped.
            found_so_far = jax.lax.stop_gradient(found)
            channels = list(jnp.moveaxis(seen[1], -1, 0))
            warped = warp_by_grid(channels, found_so_far, shape, method=self.interpolator)
            change, state = network(seen[0], jnp.stack(warped, axis=-1), grid_size)
            return found + change, state

        control_grid = jnp.zeros((fixed.shape[0], *grid_size, 3), fixed.dtype)
        if train and self.iterations > 1:
            before = jax.random.randint(self.make_rng("iterations"), (), 0, self.iterations)
            once = self.clone(parent=None)
            params = jax.lax.stop_gradient(self.variables)

            def given(fixed, warped, grid_size):
                return once.apply(params, fixed, warped, grid_size, method="_run")

            control_grid = jax.lax.fori_loop(0, before, lambda _, found: run(found, given)[0], control_grid)
            control_grid, state = run(control_grid, self._run)
        elif self.iterations == 1:
            control_grid, state = self._run(*seen, grid_size)
        else:
            # A scan with shared weights: the network is compiled once, however often it runs.
            repeated = nn.scan(
                lambda model, found, _: run(found, model._run),
                variable_broadcast="params",
                split_rngs={"params": False},
                length=self.iterations,
            )
            control_grid, states = repeated(self, control_grid, None)
            state = states[-1]
        displacement = interpolate(control_grid, shape, method=self.interpolator)
        log_variance = variance = None
        if self.bayesian:
            if self.variance == "predicted":
                log_variance = nn.Dense(3, kernel_init=nn.initializers.zeros_init(), name="variance_head")(state)
            else:
                warped = warp(moving, jax.lax.stop_gradient(displacement))
                observed = jnp.log(self._observed_variance(fixed, warped, grid_size))
                log_variance = observed + self.param("log_variance", nn.initializers.zeros_init(), (3,))
            variance = interpolate_variance(jnp.exp(log_variance), shape, method=self.interpolator)
        return Prediction(
            displacement=displacement,
            control_grid=control_grid,
            control_displacement=interpolate_at_controls(control_grid, method=self.interpolator),
            log_variance=log_variance,
            variance=variance,
            segmentation=segmentation,
        )

    def _check_fields(self) -> None:
        """Raise `InputError` for a field that no part below would name."""
        check_fields(self, 2, "tokens")
        check_fields(self, 1, "levels", "width", "projection", "decoder", "heads", "iterations")
        check_fields(self, 0, "downsampled", "contrast_window", "segmenter", "labels", "bound")
        if self.contrast_window and self.contrast_window % 2 == 0:
            raise InputError(f"model.contrast_window is {self.contrast_window}: give an odd number of voxels, or 0")
        check_known("model.precision", self.precision, ("float32", "bfloat16"))
        check_known("model.variance", self.variance, ("observed", "predicted"))
        if len(set(self.skips)) < len(self.skips) or not all(0 <= level < self.levels for level in self.skips):
            raise InputError(f"model.skips is {self.skips}: give levels from 0 to {self.levels - 1}, each once")

    @nn.compact
    def _run(self, fixed, moving, grid_size) -> tuple[Float[Array, "N gx gy gz 3"], Float[Array, "N gx gy gz C"]]:
        """One run of the network: control grid of the map from fixed to moving, images with maps of labels behind; and
        the features of its points."""
        shape = fixed.shape[1:4]
        images = jnp.concatenate([fixed[..., :1], moving[..., :1]], axis=-1)
        if self.contrast_window:
            images = local_norm(images, self.contrast_window)
        images = jnp.concatenate([images, fixed[..., 1:], moving[..., 1:]], axis=-1)
        fields = dict(levels=self.levels, width=self.width, downsampled=self.downsampled)
        encoder = build_encoder(self.encoder, **fields, name="encoder")
        pyramid = self._checked(encoder(images.astype(self.precision)))
        pyramid = [level._replace(features=level.features.astype(jnp.float32)) for level in pyramid]
        state = self._decode(pyramid, grid_size, shape)

        # Zero weights: the map starts at the identity. Normalised units, 1 = half the lattice, as in the paper.
        head = nn.Dense(3, kernel_init=nn.initializers.zeros_init(), name="head")(state)
        if self.bound:
            head = self.bound * jnp.tanh(head / self.bound)
        return head * jnp.asarray([(size - 1) / 2 for size in shape], head.dtype), state

    def _checked(self, pyramid):
        """What an encoder gave, if it is a pyramid: it may come from elsewhere."""
        maps = isinstance(pyramid, Sequence) and all(isinstance(level, FeatureMap) for level in pyramid)
        if not maps or len(pyramid) < self.levels or any(level.features.ndim != 5 for level in pyramid):
            raise InputError(
                f"model.encoder: {self.encoder!r} must give {self.levels} of `layers.FeatureMap`, fine to coarse, "
                "with features [N, x, y, z, C]"
            )
        return pyramid

    def _observed_variance(self, fixed, warped, grid_size) -> Float[Array, "N gx gy gz 1"]:
        """Variance (squared voxels) of a component of the displacement around every control point, from the images.

        A displacement e away from the right one leaves the difference `grad F . e`, to first order. So the mean squared
        difference over the mean squared gradient, both over a cell of the grid, is the variance of a component of e. It
        is kept from growing where there is no gradient, and away from 0 where there is no difference.
        """
        residual, steepness = normalised_residual(fixed, warped)
        points = [
            control_positions(self.interpolator, g) * (size - 1)
            for g, size in zip(grid_size, fixed.shape[1:4], strict=True)
        ]
        steepness = resample_features(steepness.sum(-1, keepdims=True), points)
        return resample_features(residual, points) / (steepness + 0.02) + 1e-4

    def _decode(self, pyramid: list[FeatureMap], grid_size, shape) -> Float[Array, "N gx gy gz C"]:
        """Features of the control points, from which the heads read their values."""
        positions = [control_positions(self.interpolator, g) for g in grid_size]
        lattice = positions if self.window else [np.linspace(0, 1, self.tokens)] * 3
        tokens = jnp.stack([self._project(pyramid[level], level, lattice, shape) for level in self._decoded])
        encoding, around = (self._encoding(points, tokens[0]) for points in (positions, lattice))
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
        return nn.LayerNorm(name="head_norm")(state)

    @property
    def _decoded(self) -> tuple[int, ...]:
        """Encoder levels that the decoder visits, coarse to fine."""
        return (self.levels - 1, *(level for level in self.skips if level < self.levels - 1))

    def _project(self, level: FeatureMap, index: int, lattice, shape) -> Float[Array, "N px py pz C"]:
        """Skip projection: features of a level as tokens P^(l) on a lattice of points in [0, 1]."""
        parts = nn.Dense((3 if self.products else 1) * self.projection, name=f"projection{index}")(level.features)
        if self.products:
            # Products of features (an image difference times a gradient, say) are what tells a displacement, and
            # averaging over a cell would leave nothing to multiply.
            linear, left, right = jnp.split(parts, 3, axis=-1)
            parts = linear + left * right
        return resample_features(parts, feature_coordinates(level, lattice, shape))

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
    window: int
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
