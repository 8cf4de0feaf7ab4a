"""KeyMorph: keypoints of each image by one network, and the map between them in closed form.

Source: Wang et al., A robust and interpretable deep learning framework for multi-modal registration via keypoints,
Medical Image Analysis 2023; architecture after the authors' package, version 2.0.1 (its convolutional backbone).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from gridreg_jax.errors import InputError, check_known
from gridreg_jax.models.fields import check_fields
from gridreg_jax.models.layers import Conv3D, instance_norm
from gridreg_jax.models.prediction import Prediction
from gridreg_jax.transforms.affine import affine_displacement, fit_affine, fit_rigid
from gridreg_jax.transforms.thin_plate import KERNELS, fit_thin_plate
from gridreg_jax.transforms.warp import identity_grid

# Features of the blocks before the last one, and the blocks after which the lattice is halved.
WIDTHS = (32, 64, 64, 128, 128, 256, 256, 512)
HALVED = (1, 3, 5, 7)
TRANSFORMS = ("tps", "affine", "rigid")
# How the smoothing of a training step may be drawn, from the largest value down to 0 or to the smallest.
DRAWS = ("", "uniform", "loguniform")
LARGEST, SMALLEST = 10.0, 1e-6


class KeyMorph(nn.Module):
    """Keypoints are centres of mass of heat maps, the same ones in both images, and so correspond.

    The map is fitted in voxels; the spline with half the longest side of the lattice as unit of length, which on a cube
    makes the smoothing the authors' lambda. Keypoints and displacement are in voxels.

    Source: Wang et al., Medical Image Analysis 2023.

    Attributes:
      keypoints: how many; the authors use 64 to 512.
      transform: "tps" (thin-plate spline), "affine" or "rigid".
      smoothing: lambda of the spline: 0 interpolates the keypoints, 10 is almost affine. The only regulariser.
      draw: of lambda in training, from the stream "lambda": "uniform" in [0, 10], "loguniform" in [1e-6, 10]; "":
        none, it is `smoothing`.
      kernel: of the spline (see `thin_plate.KERNELS`): "r2logr", the authors'; "r" is that of three dimensions.
      weighted: weight each keypoint with the product of its two heat maps' sums, 1 on average (the authors' "power").
    """

    keypoints: int = 128
    transform: str = "tps"
    smoothing: float = 0.0
    draw: str = ""
    kernel: str = "r2logr"
    weighted: bool = False

    @nn.compact
    def __call__(
        self,
        fixed: Float[Array, "N X Y Z 1"],
        moving: Float[Array, "N X Y Z 1"],
        *,
        grid_size: None = None,
        train: bool = False,
    ) -> Prediction:
        """Predict the map from fixed to moving.

        Args:
          grid_size: there is no control grid.
          train: draw the smoothing, if it is to be drawn; needs the random stream "lambda".

        Raises:
          InputError: a field has a value that is not known, or is out of range.
        """
        self._check()
        heat = HeatMaps(self.keypoints, name="backbone")(jnp.concatenate([fixed, moving]))
        points = center_of_mass(heat, fixed.shape[1:4])
        fixed_points, moving_points = jnp.split(points, 2)
        weights = None
        if self.weighted:
            power = jnp.prod(jnp.stack(jnp.split(heat.sum(axis=(1, 2, 3)), 2)), axis=0)
            weights = power / jnp.maximum(power.mean(axis=1, keepdims=True), 1e-12) + 1e-6
        displacement, affine = self._map(fixed_points, moving_points, weights, fixed.shape[1:4], train)
        return Prediction(displacement=displacement, affine=affine, keypoints=(fixed_points, moving_points))

    @property
    def example_streams(self) -> tuple[str, ...]:
        """Random streams of which training gives each example one of its own."""
        return ("lambda",) if self.draw else ()

    def _map(self, fixed_points, moving_points, weights, shape, train):
        """Displacement, and the affine where it is one."""
        if self.transform != "tps":
            affine = (fit_affine if self.transform == "affine" else fit_rigid)(fixed_points, moving_points, weights)
            return affine_displacement(affine, shape), affine
        center, unit = (np.array(shape) - 1) / 2, max(max(shape) - 1, 1) / 2
        fixed_points, moving_points, grid = (
            (points - center) / unit for points in (fixed_points, moving_points, identity_grid(shape))
        )
        smoothing = self._draw() if train and self.draw else self.smoothing
        spline = fit_thin_plate(fixed_points, moving_points, weights, smoothing=smoothing, kernel=self.kernel)
        return unit * spline.displacement_at(grid.reshape(-1, 3)).reshape(-1, *shape, 3), None

    def _draw(self) -> Float[Array, ""]:
        share = jax.random.uniform(self.make_rng("lambda"))
        return LARGEST * share if self.draw == "uniform" else SMALLEST * (LARGEST / SMALLEST) ** share

    def _check(self) -> None:
        for name, known in (("transform", TRANSFORMS), ("draw", DRAWS), ("kernel", KERNELS)):
            check_known(f"model.{name}", getattr(self, name), known)
        if self.keypoints < 4:
            raise InputError(f"model.keypoints is {self.keypoints}: a map in three dimensions needs 4 or more")
        check_fields(self, 0, "smoothing")


class HeatMaps(nn.Module):
    """The backbone: one non-negative heat map a keypoint, at a sixteenth of the lattice (rounded up); no unit.

    Source: the convolutional backbone of KeyMorph (Wang et al., Medical Image Analysis 2023), after its authors' code.
    """

    keypoints: int

    @nn.compact
    def __call__(self, x: Float[Array, "N X Y Z 1"]) -> Float[Array, "N x y z K"]:
        for block, width in enumerate((*WIDTHS, self.keypoints)):
            x = nn.relu(instance_norm(Conv3D(width, normed=True, name=f"block{block}")(x)))
            if block in HALVED:
                x = nn.max_pool(x, (2, 2, 2), strides=(2, 2, 2), padding="SAME")
        return x


def center_of_mass(heat: Float[Array, "N x y z K"], shape: tuple[int, int, int]) -> Float[Array, "N K 3"]:
    """Centres of mass of heat maps in voxels of a lattice, the heat maps spread over it from corner to corner.

    A map that is 0 everywhere has the middle of the lattice.

    Source: Wang et al., Medical Image Analysis 2023 (the center-of-mass layer).
    """
    mass = heat.sum(axis=(1, 2, 3)) + 1e-8
    found = []
    for axis, size in enumerate(shape):
        cells = heat.shape[1 + axis]
        # Relative to the middle, in half lattices.
        place = jnp.linspace(-1.0, 1.0, cells) if cells > 1 else jnp.zeros(1)
        profile = heat.sum(axis=tuple(1 + other for other in range(3) if other != axis))
        middle = jnp.einsum("x,nxk->nk", place, profile, precision=jax.lax.Precision.HIGHEST) / mass
        found.append((1 + middle) * (size - 1) / 2)
    return jnp.stack(found, axis=-1)
