"""Labels of one image by itself: what tells a network, and the instance optimisation, where organs end."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from gridreg_jax.conv import local_norm
from gridreg_jax.models.layers import Conv3D, Encoder, instance_norm, resample_features


class Segmenter(nn.Module):
    """A small feature pyramid from an image to its labels. Not in the paper.

    Four levels of `Encoder`, the first three halving the lattice; from the coarsest one upwards, each is projected to
    the next one's width, interpolated, added to it and convolved.

    Attributes:
      labels: how many there are beside the background.
      width: features at half the resolution.
      contrast_window: voxels an axis (odd) of the box in which intensities are normalised for a second input channel;
        0: none.

    Source: feature pyramids, Lin et al., CVPR 2017.
    """

    labels: int
    width: int = 16
    contrast_window: int = 0

    @nn.compact
    def __call__(self, image: Float[Array, "N X Y Z 1"]) -> Float[Array, "N X Y Z L"]:
        """Logarithms of the probabilities of background and labels, up to a constant.

        They are computed at half the resolution and interpolated.
        """
        x = image
        if self.contrast_window:
            x = jnp.concatenate([image, local_norm(image, self.contrast_window)], axis=-1)
        *finer, coarsest = Encoder(levels=4, width=self.width, downsampled=3, name="encoder")(x)
        x, stride = coarsest.features, coarsest.stride
        for index, level in reversed(list(enumerate(finer))):
            width = level.features.shape[-1]
            x = nn.Dense(width, name=f"projection{index}")(x)
            x = _finer(x, level.features.shape[1:4], stride // level.stride) + level.features
            x = nn.leaky_relu(instance_norm(Conv3D(width, normed=True, name=f"level{index}")(x)), 0.1)
            stride = level.stride
        return _finer(nn.Dense(self.labels + 1, name="head")(x), image.shape[1:4], stride)


def _finer(features, shape: tuple[int, int, int], factor: int):
    """Features interpolated at every voxel of a lattice that has `factor` voxels for one of theirs."""
    return features if factor == 1 else resample_features(features, [np.arange(size) / factor for size in shape])
