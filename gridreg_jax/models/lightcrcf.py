"""A "LightCRCF-style" network: coarse to fine over resolutions, with convolutions that train as several branches.

The ideas are those of LightCRCF (Medical Physics 2025, doi 10.1002/mp.17827): a field that is composed over resolutions
(cross-resolution coarse to fine), texture-aware branches (TaRep: Sobel and Laplacian) and groups of flows (GfRep),
merged exactly into single convolutions for inference. Layers, widths and losses are not public: those here are this
library's, and its results are not the authors'.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from gridreg_jax.conv import conv3d
from gridreg_jax.errors import InputError
from gridreg_jax.models.fields import check_fields
from gridreg_jax.models.layers import Conv3D, crop
from gridreg_jax.models.prediction import Prediction
from gridreg_jax.transforms.pyramid import double, halve
from gridreg_jax.transforms.warp import compose, warp

GROUPS = 3
_HIGHEST = jax.lax.Precision.HIGHEST


class LightCRCF(nn.Module):
    """At each resolution, coarse to fine, a small U-Net adds to the map what is left between fixed and warped moving.

    The composed map of a stage is `phi(x) = u(x) + phi_before(x + u(x))`, u being what its U-Net finds; both in voxels.

    Source: the ideas of Liu et al., LightCRCF, Medical Physics 2025; layers and widths are this library's.

    Attributes:
      stages: resolutions, each twice as fine as the one before; the last is the images' own.
      encoder: features of the U-Net's levels; each level after the first halves the lattice.
      decoder: features on the way back, one fewer.
      shared: one U-Net for all stages. The default sizes have 91569 parameters once fused; shared, with encoder
        (8, 16, 24, 32) and decoder (24, 16, 8), 94523.
      fused: plain convolutions, for parameters that have been through `fuse`.
    """

    stages: int = 3
    encoder: tuple[int, ...] = (8, 16, 16)
    decoder: tuple[int, ...] = (16, 8)
    shared: bool = False
    fused: bool = False

    @nn.compact
    def __call__(
        self,
        fixed: Float[Array, "N X Y Z 1"],
        moving: Float[Array, "N X Y Z 1"],
        *,
        grid_size: None = None,
        train: bool = False,
    ) -> Prediction:
        """Predict the map from fixed to moving; `grid_size` and `train` change nothing.

        Raises:
          InputError: no stages, or widths that make no U-Net.
        """
        check_fields(self, 1, "stages", "encoder", "decoder")
        if len(self.encoder) != len(self.decoder) + 1:
            raise InputError(
                f"model.encoder has {len(self.encoder)} levels and model.decoder {len(self.decoder)}: "
                "the decoder needs one fewer than the encoder"
            )
        pyramid = [(fixed, moving)]
        for _ in range(self.stages - 1):
            pyramid.append(tuple(halve(volume) for volume in pyramid[-1]))
        fields = dict(encoder=self.encoder, decoder=self.decoder, fused=self.fused)
        networks = [UNet(**fields, name=f"unet{stage}") for stage in range(1 if self.shared else self.stages)]
        networks *= self.stages if self.shared else 1
        displacement = None
        for network, (fixed_stage, moving_stage) in zip(networks, reversed(pyramid), strict=True):
            if displacement is None:
                displacement = network(jnp.concatenate([moving_stage, fixed_stage], axis=-1))
                continue
            displacement = double(displacement, fixed_stage.shape[1:4])
            warped = warp(moving_stage, displacement)
            displacement = compose(displacement, network(jnp.concatenate([warped, fixed_stage], axis=-1)))
        return Prediction(displacement=displacement)


class UNet(nn.Module):
    """Displacement (voxels) between two images, given as two channels; the fields are those of `LightCRCF`.

    Source: Ronneberger et al., U-Net, MICCAI 2015; widths of this library.
    """

    encoder: Sequence[int]
    decoder: Sequence[int]
    fused: bool

    @nn.compact
    def __call__(self, x: Float[Array, "N X Y Z 2"]) -> Float[Array, "N X Y Z 3"]:
        conv, head = (Conv3D, Conv3D) if self.fused else (TextureConv, GroupFlow)
        skips = []
        for level, width in enumerate(self.encoder):
            x = nn.leaky_relu(conv(width, stride=2 if level else 1, name=f"down{level}")(x), 0.2)
            skips.append(x)
        for level, width in enumerate(self.decoder):
            skip = skips[-2 - level]
            for axis in (1, 2, 3):
                x = jnp.repeat(x, 2, axis=axis)
            x = jnp.concatenate([crop(x, skip.shape[1:4]), skip], axis=-1)
            x = nn.leaky_relu(conv(width, name=f"up{level}")(x), 0.2)
        return head(3, name="flow")(x)


def _operators() -> Float[np.ndarray, "4 3 3 3"]:
    """Sobel along each axis, `[-1, 0, 1]` times `[1, 2, 1]` along the other two, and the six-neighbour Laplacian."""
    lines = [[1, 2, 1], [1, 2, 1], [-1, 0, 1]]
    sobel = [np.einsum("i,j,k->ijk", *lines[2 - axis :], *lines[: 2 - axis]) for axis in range(3)]
    laplacian = np.where(np.abs(np.indices((3, 3, 3)) - 1).sum(axis=0) == 1, 1, 0)
    laplacian[1, 1, 1] = -6
    return np.stack([*sobel, laplacian]).astype(np.float32)


OPERATORS = _operators()


class TextureConv(nn.Module):
    """TaRep: a 3x3x3 convolution, three planar ones, a widened pair and fixed edge operators, summed, times a gain.

    All branches are linear, so their sum is one 3x3x3 convolution, and that is how it is computed: training costs what
    inference does. A 1x1x1 convolution makes six times the features: two of the six go through a 3x3x3 convolution,
    four through a fixed operator each, with a learned scale a feature. Only the sum has a bias: where a branch pads the
    input of its 1x1x1 convolution, as it must to be one convolution at the borders too, a bias inside it adds a
    constant.

    In place of the authors' batch norm, whose statistics make it another function in training than in inference, there
    is a learned gain a feature.

    Source: the idea of TaRep, Liu et al., Medical Physics 2025; the branches after Zhang et al., Edge-oriented
    convolution block, ACM Multimedia 2021.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "N X Y Z C"]) -> Float[Array, "N x y z D"]:
        inputs, outputs = x.shape[-1], self.features
        # The sum starts as the first branch: the others need no draws, of which each takes a second to compile.
        zeros = nn.initializers.zeros_init()
        shapes = {
            "cube": (nn.initializers.he_normal(), (3, 3, 3, inputs, outputs)),
            "plane0": (zeros, (1, 3, 3, inputs, outputs)),
            "plane1": (zeros, (3, 1, 3, inputs, outputs)),
            "plane2": (zeros, (3, 3, 1, inputs, outputs)),
            "widen": (_copies, (inputs, (2 + len(OPERATORS)) * outputs)),
            "narrow": (zeros, (3, 3, 3, 2 * outputs, outputs)),
            "scales": (zeros, (len(OPERATORS), outputs)),
            "gain": (nn.initializers.ones_init(), (outputs,)),
            "bias": (zeros, (outputs,)),
        }
        merged = merge_texture({name: self.param(name, *made) for name, made in shapes.items()})
        return conv3d(x, merged["kernel"], stride=self.stride) + merged["bias"]


def _copies(key, shape: tuple[int, int]) -> Float[Array, "C D"]:
    """A matrix that makes every feature one of the inputs, in turn."""
    del key  # the same for every seed
    return jnp.asarray(np.arange(shape[0])[:, None] == np.arange(shape[1]) % shape[0], jnp.float32)


class GroupFlow(nn.Module):
    """GfRep: a flow that is mixed from those of `GROUPS` 3x3x3 convolutions; computed as the one that they make.

    The flow is in voxels. Source: the idea of GfRep, Liu et al., Medical Physics 2025.
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "N X Y Z C"]) -> Float[Array, "N X Y Z D"]:
        def mean(key, shape):
            del key  # the same for every seed
            return jnp.tile(jnp.eye(shape[1]) / GROUPS, (GROUPS, 1))

        groups = GROUPS * self.features
        params = {
            # Near the identity at the start.
            "groups": self.param("groups", nn.initializers.normal(1e-5), (3, 3, 3, x.shape[-1], groups)),
            "mix": self.param("mix", mean, (groups, self.features)),
            "bias": self.param("bias", nn.initializers.zeros_init(), (self.features,)),
        }
        merged = merge_flow(params)
        return conv3d(x, merged["kernel"]) + merged["bias"]


def merge_texture(params: Mapping[str, Array]) -> dict[str, Array]:
    """Kernel and bias of the one convolution that a `TextureConv` is.

    Source: sums and sequences of convolutions as one, Ding et al., Diverse branch block, CVPR 2021.
    """
    kernel = params["cube"]
    for axis in range(3):
        kernel += jnp.pad(params[f"plane{axis}"], [(1, 1) if a == axis else (0, 0) for a in range(5)])
    outputs = kernel.shape[-1]
    widen, seen = jnp.split(params["widen"], [2 * outputs], axis=1)
    kernel += jnp.einsum("im,xyzmo->xyzio", widen, params["narrow"], precision=_HIGHEST)
    seen = seen.reshape(len(seen), -1, outputs)
    kernel += jnp.einsum("kxyz,iko,ko->xyzio", OPERATORS, seen, params["scales"], precision=_HIGHEST)
    return {"kernel": kernel * params["gain"], "bias": params["bias"]}


def merge_flow(params: Mapping[str, Array]) -> dict[str, Array]:
    """Kernel and bias of the one convolution that a `GroupFlow` is.

    Source: a convolution and the 1x1x1 one after it as one, Ding et al., Diverse branch block, CVPR 2021.
    """
    kernel = jnp.einsum("xyzcg,go->xyzco", params["groups"], params["mix"], precision=_HIGHEST)
    return {"kernel": kernel, "bias": params["bias"]}


def fuse(params: Mapping) -> dict:
    """Parameters of `LightCRCF(fused=True)` that is the same function as `LightCRCF` with `params`.

    Every convolution of several branches becomes one of 3x3x3; what is fused already stays.

    Source: the reparameterisation of Liu et al., Medical Physics 2025 (TaRep and GfRep).
    """
    if "cube" in params:
        return merge_texture(params)
    if "groups" in params:
        return merge_flow(params)
    return {name: fuse(value) if isinstance(value, Mapping) else value for name, value in params.items()}
