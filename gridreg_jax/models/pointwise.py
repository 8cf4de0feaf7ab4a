"""GridReg without attention, of exactly the size that the paper states."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from gridreg_jax.models.gridreg import GridReg
from gridreg_jax.models.layers import FeatureMap, feature_coordinates, resample_features
from gridreg_jax.transforms.interpolation import control_positions


class PointwiseGridReg(GridReg):
    """Features at every control point, level after level, through layers that look at no other control point.

    With 5 levels and width 16 it has 252 960 parameters, the number in the paper's Table 2, which fits neither network
    that the authors released: 1x1x1 projections to 256 channels, a decoder of width 3 that begins with the bottom level
    and the coordinates, and a second projection of the finest level (unused in the released decoder, added to the
    first here, so that no parameter is dead). An inference from the number, not a documented fact.

    Attributes:
      As for `GridReg`; `heads`, `window`, `tokens` and `products` have no meaning here.
    """

    downsampled: int = 3
    projection: int = 256
    decoder: int = 3
    bound: float = 1.0

    def _decode(self, pyramid: list[FeatureMap], grid_size, shape) -> Float[Array, "N gx gy gz C"]:
        lattice = [control_positions(self.interpolator, g) for g in grid_size]

        def at_controls(features, level):
            return resample_features(features, feature_coordinates(pyramid[level], lattice, shape))

        def project(level, name):
            # A linear map of each voxel and a mean over voxels commute; this order is the cheaper one.
            return nn.Dense(self.projection, name=name)(at_controls(pyramid[level].features, level))

        bottom, *levels = self._decoded
        features = at_controls(pyramid[bottom].features, bottom)
        coordinates = np.stack(np.meshgrid(*(2 * axis - 1 for axis in lattice), indexing="ij"), axis=-1)
        coordinates = jnp.broadcast_to(jnp.asarray(coordinates, features.dtype), (*features.shape[:-1], 3))
        features = jnp.concatenate([features, coordinates], axis=-1)
        for level in levels:
            state = nn.leaky_relu(nn.Dense(self.decoder, name=f"step{level}")(features), 0.1)
            projected = project(level, f"projection{level}")
            if level == levels[-1]:
                projected = projected + project(level, "projection_again")
            features = jnp.concatenate([state, projected], axis=-1)
        return features
