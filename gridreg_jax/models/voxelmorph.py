"""VoxelMorph: a U-Net from two images to a displacement or a velocity at every voxel.

Sources: Balakrishnan et al., IEEE TMI 2019 (displacement); Dalca et al., Medical Image Analysis 2019 (velocity, drawn
from a posterior); sizes and order of operations from their code. docs/models.md says where this departs, and why.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from gridreg_jax.errors import InputError
from gridreg_jax.models.fields import check_fields
from gridreg_jax.models.layers import Conv3D, crop, flow_of_half, pad_to_multiple
from gridreg_jax.models.prediction import Prediction
from gridreg_jax.transforms.interpolation import interpolate
from gridreg_jax.transforms.warp import half_lattice


class VoxelMorph(nn.Module):
    """U-Net and flow head. The defaults are the authors' present network, with 327 331 parameters.

    The displacement is in voxels. Source: Balakrishnan et al., IEEE TMI 2019; Dalca et al., Medical Image Analysis
    2019.

    Attributes:
      encoder: features of the levels, fine to coarse; each halves the lattice.
      decoder: features of the convolutions at each resolution, coarse to fine: one resolution more than there are
        levels. From one to the next the lattice is doubled, to the nearest, and the encoder's features there join in.
      strided: halve by convolutions of stride 2, so that the images themselves join in at full resolution, as in the
        papers; False: by maxima of 2x2x2 voxels, after convolutions of stride 1.
      steps: squarings by which a velocity at half resolution is integrated; 0: the head gives the displacement.
      bidirectional: also predict the map from moving to fixed, the flow backwards.
      probabilistic: predict a posterior of the velocity, from which training draws.
    """

    encoder: tuple[int, ...] = (16, 32, 32, 32)
    decoder: tuple[tuple[int, ...], ...] = ((32,), (32,), (32,), (32,), (32, 16, 16))
    strided: bool = False
    steps: int = 7
    bidirectional: bool = False
    probabilistic: bool = False

    @property
    def example_streams(self) -> tuple[str, ...]:
        """Random streams of which training gives each example a key of its own."""
        return ("velocity",) if self.probabilistic else ()

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
          train: draw the velocity from the posterior, if there is one, with the random stream "velocity"; otherwise
            it is the mean.

        Raises:
          InputError: a field is out of range, or contradicts another.
        """
        if len(self.decoder) != len(self.encoder) + 1:
            raise InputError(f"model.decoder must have a resolution more than the {len(self.encoder)} of model.encoder")
        check_fields(self, 1, "encoder", "decoder")
        check_fields(self, 0, "steps")
        for name in ("bidirectional", "probabilistic"):
            if getattr(self, name) and not self.steps:
                raise InputError(f"model.{name} needs a velocity, which model.steps=0 does without")
        shape = fixed.shape[1:4]
        features = self._unet(pad_to_multiple(jnp.concatenate([moving, fixed], axis=-1), 2 ** len(self.encoder)))
        # The map starts at the identity, all but exactly.
        flow = crop(Conv3D(3, kernel_init=nn.initializers.normal(1e-5), name="flow")(features), shape)
        if not self.steps:
            return Prediction(displacement=flow)

        mean = log_variance = None
        if self.probabilistic:
            small, low = nn.initializers.normal(1e-10), nn.initializers.constant(-10.0)
            log_variance = crop(Conv3D(3, kernel_init=small, bias_init=low, name="log_variance")(features), shape)
            mean = flow
            if train:
                flow += jnp.exp(0.5 * log_variance) * jax.random.normal(self.make_rng("velocity"), flow.shape)
        velocity = interpolate(flow, half_lattice(shape)) / 2
        return Prediction(
            displacement=flow_of_half(velocity, shape, steps=self.steps),
            inverse_displacement=flow_of_half(-velocity, shape, steps=self.steps) if self.bidirectional else None,
            velocity=mean if self.probabilistic else velocity,
            velocity_log_variance=log_variance,
        )

    def _unet(self, x: Float[Array, "N X Y Z C"]) -> Float[Array, "N X Y Z D"]:
        """Features at every voxel, for sizes that can be halved as often as there are levels."""

        def convolve(x, features, name, stride=1):
            return nn.leaky_relu(Conv3D(features, stride=stride, name=name)(x), 0.2)

        skips = []
        for level, features in enumerate(self.encoder):
            if self.strided:
                skips.append(x)
                x = convolve(x, features, f"encoder{level}", stride=2)
            else:
                skips.append(convolve(x, features, f"encoder{level}"))
                x = nn.max_pool(skips[-1], (2, 2, 2), strides=(2, 2, 2))
        for level, widths in enumerate(self.decoder):
            if level:
                x = jnp.concatenate([_doubled(x), skips.pop()], axis=-1)
            for number, features in enumerate(widths):
                x = convolve(x, features, f"decoder{level}_{number}")
        return x


def _doubled(x: Float[Array, "N X Y Z C"]) -> Float[Array, "N x y z C"]:
    """Every voxel twice along every axis."""
    n, *shape, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :, None], (n, shape[0], 2, shape[1], 2, shape[2], 2, channels))
    return x.reshape(n, *(2 * size for size in shape), channels)
