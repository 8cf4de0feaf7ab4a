"""What every model returns: all that follows (losses, evaluation, export) sees only this."""

import jax
from flax import struct
from jaxtyping import Array, Float


def label_probabilities(logits: Float[Array, "N X Y Z K"]) -> Float[Array, "N X Y Z L"]:
    """Of the labels alone, from logarithms for the background (channel 0) and the labels, by a softmax; no unit."""
    return jax.nn.softmax(logits)[..., 1:]


@struct.dataclass
class Prediction:
    """The map from fixed to moving that a model predicts; voxels of the fixed lattice, component c along axis c."""

    displacement: Float[Array, "N X Y Z 3"]
    control_grid: Float[Array, "N gx gy gz 3"] | None = None
    # Displacement at the control positions, where the grid-level similarity samples the images.
    control_displacement: Float[Array, "N gx gy gz 3"] | None = None
    # Of a Bayesian head: log variance of the control grid (squared voxels), and the variance of the displacement.
    log_variance: Float[Array, "N gx gy gz 3"] | None = None
    variance: Float[Array, "N X Y Z 3"] | None = None
    # Of a model that integrates: the stationary velocity, in voxels of its own lattice, which may be coarser; where
    # training draws it from a posterior, the mean of that and its log variance (squared voxels of the same lattice).
    velocity: Float[Array, "N x y z 3"] | None = None
    velocity_log_variance: Float[Array, "N x y z 3"] | None = None
    # The map from moving to fixed, of a model that is asked for both directions.
    inverse_displacement: Float[Array, "N X Y Z 3"] | None = None
    # Of a model that matches keypoints: those of the fixed and of the moving image, voxels; and the map, if it is an
    # affine, from voxels to voxels.
    keypoints: tuple[Float[Array, "N K 3"], Float[Array, "N K 3"]] | None = None
    affine: Float[Array, "N 4 4"] | None = None
    # Of a model with a segmenter: logarithms of the probabilities of background and labels, up to a constant, of the
    # fixed and of the moving image.
    segmentation: tuple[Float[Array, "N X Y Z L"], Float[Array, "N X Y Z L"]] | None = None

    @property
    def label_maps(self) -> tuple[Float[Array, "N X Y Z L"], Float[Array, "N X Y Z L"]] | None:
        """Probabilities of the labels, without the background, in the fixed and in the moving image."""
        if self.segmentation is None:
            return None
        fixed, moving = map(label_probabilities, self.segmentation)
        return fixed, moving
