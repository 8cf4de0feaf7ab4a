"""NCF: the map of one pair as a small network of its own, fitted to the two images; no training set.

Source: Neural Correspondence Field, arXiv 2503.00760, of which the parts are known (a perceptron from coordinates to
displacements, a convolutional smoother, losses of intensity, structure and occupancy) and the sizes are not: widths,
weights and learning rate are this library's, with 60262 parameters in all where the authors state 0.06 million.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from gridreg_jax.instance import descend
from gridreg_jax.losses import diffusion_energy, ssim
from gridreg_jax.models.layers import Conv3D
from gridreg_jax.transforms.interpolation import contract, hat_weights
from gridreg_jax.transforms.warp import identity_grid, sample

# Weights of the terms beside the mean absolute difference: structural similarity, agreement of what is occupied, and
# mean squared first differences of the displacement.
SSIM, OCCUPANCY, GRADIENT = 1.0, 0.1, 0.1
# Of structural similarity: voxels an axis, of those at which the images are compared.
WINDOW = 5
# Along an axis of fewer voxels, the images are compared at every one.
FEW = 24
# How steeply occupancy rises with intensity.
STEEPNESS = 100.0


class CorrespondenceField(nn.Module):
    """A displacement at every voxel of a lattice: a perceptron of its coordinates, and a smoother that adds to it.

    Attributes:
      frequencies: of the sines and cosines beside each coordinate in [-1, 1], `2^k pi` for k from 0, with amplitudes
        `2^-k`: what is smooth is found first.
      width, layers: hidden features and linear layers of the perceptron.
      smoother: features between the two convolutions.
    """

    frequencies: int = 6
    width: int = 128
    layers: int = 5
    smoother: int = 32

    @nn.compact
    def __call__(self, shape: tuple[int, int, int]) -> Float[Array, "1 X Y Z 3"]:
        """In voxels; all but 0 at the start."""
        dense = functools.partial(nn.Dense, self.width, kernel_init=nn.initializers.he_normal())
        hidden = 0.0
        # The first layer is a sum over the axes: no lattice of encoded coordinates is made.
        for axis, size in enumerate(shape):
            codes = dense(use_bias=axis == 0, name=f"axis{axis}")(self._encoded(size))
            hidden += codes.reshape([1] + [size if a == axis else 1 for a in range(3)] + [self.width])
        for layer in range(1, self.layers - 1):
            hidden = dense(name=f"layer{layer}")(nn.relu(hidden))
        small = nn.initializers.normal(1e-4)
        displacement = nn.Dense(3, kernel_init=small, name="coarse")(nn.relu(hidden))
        between = nn.relu(Conv3D(self.smoother, in_loop=True, name="smoother")(displacement))
        return displacement + Conv3D(3, in_loop=True, kernel_init=small, name="smooth")(between)

    def _encoded(self, size: int) -> Float[Array, "X F"]:
        place = jnp.linspace(-1.0, 1.0, size)[:, None]
        octaves = 2.0 ** jnp.arange(self.frequencies)
        phase = place * jnp.pi * octaves
        return jnp.concatenate([place, jnp.sin(phase) / octaves, jnp.cos(phase) / octaves], axis=1)


def optimise(
    fixed: Float[Array, "N X Y Z 1"],
    moving: Float[Array, "N X Y Z 1"],
    *,
    key: PRNGKeyArray,
    steps: int = 250,
    learning_rate: float | Float[Array, ""] = 5e-3,
    stride: int = 2,
    mask: Shaped[Array, "N X Y Z"] | None = None,
) -> Float[Array, "N X Y Z 3"]:
    """The displacement from fixed to moving, by Adam on a network for each pair.

    Args:
      fixed, moving: of one modality, intensities in [0, 1].
      key: of the networks' first weights.
      steps: of Adam, its step size falling to 0 along a cosine; static under jit.
      learning_rate: of the first step.
      stride: from one voxel, along an axis, at which the images are compared to the next (1 where an axis has fewer
        than `FEW`); both images keep their resolution, and the displacement is then interpolated. Static under jit.
      mask: weight of each voxel of the fixed lattice in the comparisons.
    """
    full = fixed.shape[1:4]
    strides = np.array([stride if size >= FEW else 1 for size in full])
    sparse = (slice(None), *(slice(None, None, step) for step in strides))
    fixed, mask = fixed[sparse], None if mask is None else mask[sparse]
    network, shape = CorrespondenceField(), fixed.shape[1:4]

    def fit(case):
        key, *images = case
        fixed, moving, mask = jax.tree.map(lambda array: array[None], images)

        def loss(params):
            displacement = network.apply(params, shape)
            points = (identity_grid(shape) + displacement[0]) * strides
            dissimilarity = _dissimilarity(fixed, sample(moving[0], points)[None], mask)
            return (dissimilarity + GRADIENT * diffusion_energy(displacement))[0], dissimilarity

        params, _ = descend(loss, network.init(key, shape), steps=steps, learning_rate=learning_rate)
        return network.apply(params, shape)[0]

    displacement = jax.lax.map(fit, (jax.random.split(key, len(fixed)), fixed, moving, mask))
    matrices = [hat_weights(shape[axis], np.arange(full[axis]) / strides[axis]) for axis in range(3)]
    return contract(displacement, matrices) * strides


def _dissimilarity(fixed, warped, mask) -> Float[Array, " N"]:
    """Difference of intensity, of structure, and of what is occupied: brighter than the fixed image is on average."""
    weight = jnp.ones(fixed.shape[:4]) if mask is None else mask

    def mean(values):
        return (values[..., 0] * weight).sum((1, 2, 3)) / jnp.maximum(weight.sum((1, 2, 3)), 1e-6)

    threshold = mean(fixed)[:, None, None, None, None]
    occupied, found = (jax.nn.sigmoid(STEEPNESS * (image - threshold)) for image in (fixed, warped))
    dissimilarity = mean(jnp.abs(fixed - warped)) + OCCUPANCY * mean(jnp.square(occupied - found))
    return dissimilarity + SSIM * ssim(fixed, warped, window=WINDOW, mask=mask)
