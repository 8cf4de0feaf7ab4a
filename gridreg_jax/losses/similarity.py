"""How unlike two images are.

Every function takes (fixed, warped) and an optional mask, and returns one value a case, smaller for more alike. Images
are `[N, X, Y, Z, C]` of any spatial size, so that the same functions serve images sampled at the control points; with
several channels the value is the mean over them. The mask weights the voxels (bool or number); where it has no weight
at all, the loss is that of two unrelated images: 1, and 0 for `mse` and `mind`.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, Shaped

from gridreg_jax.conv import box_sum, local_norm
from gridreg_jax.errors import InputError

Image = Num[Array, "N X Y Z C"]
Mask = Shaped[Array, "N X Y Z"]
# Variance within a window, in that of the image, below which contrast is taken for noise.
FAINT = 1e-4


def mse(fixed: Image, warped: Image, *, mask: Mask | None = None) -> Float[Array, " N"]:
    """Mean squared difference, in squared intensity units.

    Args:
      fixed, warped: images on one lattice.
      mask: weight of each voxel.

    Source: Yan et al., Medical Physics 2026, §3.3.
    """
    fixed, warped, weight = _as_float(fixed, warped, mask)
    return jnp.mean(_mean((fixed - warped) ** 2, weight), axis=-1)


def uncertainty_weighted_mse(
    fixed: Image, warped: Image, variance: Float[Array, "N X Y Z 3"], *, penalty: float = 1.0, mask: Mask | None = None
) -> Float[Array, " N"]:
    """Squared difference that the uncertainty of the displacement discounts: `r^2 / (2 s^2) + penalty / 2 log(s^2)`.

    r is the difference of the locally normalised images, and `s^2 = sum_c variance_c (d F / d x_c)^2` plus a floor its
    variance to first order: what an uncertain displacement makes of the fixed image's gradient. With `penalty=1` the
    value is the negative log-likelihood of a Gaussian difference (less a constant), smallest where s^2 is the expected
    r^2. The paper names such a weighting and its penalty but not the formula; this form is the project's.

    Args:
      fixed, warped: images on one lattice.
      variance: of the displacement's components, squared voxels.
      penalty: weight of the term that keeps the variance from growing (the paper's lambda_0).
      mask: weight of each voxel.

    Returns:
      One value a case, without unit.

    Source: after Yan et al., Medical Physics 2026, §3.2; Kendall & Gal, NeurIPS 2017.
    """
    fixed, warped, weight = _as_float(fixed, warped, mask)
    residual, steepness = normalised_residual(fixed, warped)
    spread = jnp.sum(variance.astype(jnp.float32) * steepness, axis=-1, keepdims=True) + 0.02
    return jnp.mean(_mean(residual / (2 * spread) + 0.5 * penalty * jnp.log(spread), weight), axis=-1)


def normalised_residual(
    fixed: Float[Array, "N X Y Z 1"], warped: Float[Array, "N X Y Z 1"]
) -> tuple[Float[Array, "N X Y Z 1"], Float[Array, "N X Y Z 3"]]:
    """Squared difference of the images normalised in boxes of 5 voxels, and the fixed one's squared derivatives
    (central differences, per voxel), which are comparable wherever there is contrast, be it strong or faint.

    The first has no unit, the second is in 1 / voxel^2. Source: written for this library; the normalisation, Jarrett et
    al., ICCV 2009.
    """
    fixed, warped = (local_norm(image, 5) for image in (fixed, warped))
    slopes = [jnp.gradient(fixed, axis=axis) if fixed.shape[axis] > 1 else 0 * fixed for axis in (1, 2, 3)]
    steepness = jnp.concatenate(slopes, axis=-1) ** 2
    return (fixed - warped) ** 2, steepness


def ncc(fixed: Image, warped: Image, *, mask: Mask | None = None) -> Float[Array, " N"]:
    """One minus the correlation coefficient over the whole image: 0 for `warped = a fixed + b` with a > 0, at most 2.

    An image without contrast correlates with nothing: 1.

    Args:
      fixed, warped: images on one lattice.
      mask: weight of each voxel.

    Source: Lewis, Fast normalized cross-correlation, 1995.
    """
    fixed, warped, weight = _as_float(fixed, warped, mask)
    fixed, warped = (_centred(_standardised(image, weight), weight) for image in (fixed, warped))
    variances = _mean(fixed**2, weight) * _mean(warped**2, weight)
    return jnp.mean(1 - _mean(fixed * warped, weight) / jnp.sqrt(variances + 1e-6), axis=-1)


def lncc(fixed: Image, warped: Image, *, window: int = 9, mask: Mask | None = None) -> Float[Array, " N"]:
    """One minus the mean squared local correlation coefficient, in [0, 1].

    With covariance c and variances v, w in a window, of images of unit variance, the coefficient is
    `(|c| + e) / sqrt((v + e) (w + e))`, `e = 1e-4`: as if both images carried one and the same faint noise. So two flat
    windows are alike, a flat one and another are not, and no image is more like another than like itself. Otherwise
    blind to a change of gain, offset and sign that is constant across a window. A window that reaches over the border,
    or out of the mask, uses the voxels it has.

    Args:
      fixed, warped: images on one lattice.
      window: voxels along each axis; odd.
      mask: weight of each voxel, in the windows and in the mean: what lies outside has no influence.

    Raises:
      InputError: an even window, or none.

    Source: Avants et al., Medical Image Analysis 2008; squared as in Balakrishnan et al., IEEE TMI 2019.
    """
    _check_window("lncc", window)
    fixed, warped, weight = _as_float(fixed, warped, mask)
    fixed, warped = _standardised(fixed, weight), _standardised(warped, weight)
    _, _, fixed_variance, warped_variance, covariance = _local_moments(fixed, warped, weight, window)
    variances = (fixed_variance + FAINT) * (warped_variance + FAINT)
    return jnp.mean(1 - _mean((jnp.abs(covariance) + FAINT) ** 2 / variances, weight), axis=-1)


def ssim(fixed: Image, warped: Image, *, window: int = 7, mask: Mask | None = None) -> Float[Array, " N"]:
    """One minus the mean structural similarity, in [0, 2], of intensities in [0, 1].

    In a cube about each voxel with means m, n, variances v, w and covariance c, the similarity is
    `(2 m n + 0.01^2) (2 c + 0.03^2) / ((m^2 + n^2 + 0.01^2) (v + w + 0.03^2))`: of brightness, and of contrast and
    structure. A window that reaches over the border, or out of the mask, uses the voxels it has.

    Args:
      fixed, warped: images on one lattice.
      window: voxels along each axis; odd.
      mask: weight of each voxel, in the windows and in the mean: what lies outside has no influence.

    Raises:
      InputError: an even window, or none.

    Source: Wang et al., IEEE Trans. Image Processing 2004, with uniform windows.
    """
    _check_window("ssim", window)
    fixed, warped, weight = _as_float(fixed, warped, mask)
    mean, warped_mean, variance, warped_variance, covariance = _local_moments(fixed, warped, weight, window)
    brightness = (2 * mean * warped_mean + 1e-4) / (mean**2 + warped_mean**2 + 1e-4)
    structure = (2 * covariance + 9e-4) / (variance + warped_variance + 9e-4)
    return jnp.mean(1 - _mean(brightness * structure, weight), axis=-1)


def nmi(fixed: Image, warped: Image, *, bins: int = 32, mask: Mask | None = None) -> Float[Array, " N"]:
    """Two minus the normalised mutual information `(H(F) + H(W)) / H(F, W)`: from 0 (one determines the other) to 1.

    The joint histogram uses linear Parzen windows: an intensity between two bin centres counts for both, and the
    gradient flows through these shares. The bins span the range of each image, inside the mask; images whose
    intensities lie on bin centres give the entropies of the ordinary histogram.

    Args:
      fixed, warped: images on one lattice.
      bins: along each side of the histogram, at least 2; static under jit.
      mask: weight of each voxel.

    Raises:
      InputError: fewer than two bins.

    Source: Studholme et al., Pattern Recognition 1999; Parzen windows after Thévenaz & Unser, IEEE TIP 2000.
    """
    if bins < 2:
        raise InputError(f"nmi needs at least 2 bins; it has {bins}.")
    fixed, warped, weight = _as_float(fixed, warped, mask)

    def lower_bin(image):
        inside = True if weight is None else weight > 0
        low = jnp.min(image, axis=(1, 2, 3), keepdims=True, where=inside, initial=jnp.inf)
        high = jnp.max(image, axis=(1, 2, 3), keepdims=True, where=inside, initial=-jnp.inf)
        low, high = jax.lax.stop_gradient((low, high))
        varied = high > low
        scale = jnp.where(varied, (bins - 1) / jnp.where(varied, high - low, 1.0), 0.0)
        position = jnp.clip((image - jnp.where(varied, low, 0.0)) * scale, 0, bins - 1)
        lower = jnp.clip(jnp.floor(position), 0, bins - 2)
        return lower.astype(jnp.int32), position - lower

    # Four sums by bin of each voxel's shares. On CPU this takes a third of the time of a product of two matrices of
    # shares, voxels by bins, and needs no loop over chunks to bound the memory. A histogram of its own for every slab
    # across the X axis keeps float32 accurate over millions of voxels.
    cases, slabs, channels = fixed.shape[0], fixed.shape[1], fixed.shape[-1]
    histogram_of = jnp.arange(cases * slabs * channels).reshape(cases, slabs, 1, 1, channels) * bins**2
    (row, row_share), (column, column_share) = lower_bin(fixed), lower_bin(warped)
    weight = jnp.float32(1) if weight is None else weight
    joint = 0.0
    for down, right in itertools.product((0, 1), repeat=2):
        share = (row_share if down else 1 - row_share) * (column_share if right else 1 - column_share) * weight
        index = histogram_of + (row + down) * bins + column + right
        joint += jax.ops.segment_sum(share.ravel(), index.ravel(), cases * slabs * channels * bins**2)
    joint = joint.reshape(cases, slabs, channels, bins, bins).sum(axis=1)

    total = joint.sum(axis=(2, 3), keepdims=True)
    joint = joint / jnp.where(total > 0, total, 1.0)

    def entropy(probability, axis):
        return -jnp.sum(probability * jnp.log(jnp.where(probability > 0, probability, 1.0)), axis=axis)

    marginals = entropy(joint.sum(axis=3), axis=2) + entropy(joint.sum(axis=2), axis=2)
    both = entropy(joint, axis=(2, 3))
    varied = both > 1e-6  # nats; below, both images are constant
    return jnp.mean(2 - jnp.where(varied, marginals / jnp.where(varied, both, 1.0), 1.0), axis=-1)


def mind(
    fixed: Image, warped: Image, *, radius: int = 2, dilation: int = 2, mask: Mask | None = None
) -> Float[Array, " N"]:
    """Mean squared difference of MIND-SSC descriptors: how each patch resembles its surroundings, in 12 numbers.

    For each of the 12 pairs of the six neighbours `dilation` voxels away that are not opposite each other, the squared
    difference of the patches around the two, less the smallest of the 12, gives `exp(-difference / variance)`; the
    variance is the mean of the 12, held within a factor 1000 of its mean over the volume. Blind to gain and offset.
    Outside the volume the border voxels repeat. The value has no unit.

    Args:
      fixed, warped: images on one lattice.
      radius: of the patch, voxels: it is a cube of `2 radius + 1`.
      dilation: distance of the neighbours, voxels.
      mask: weight of each voxel in the mean; the patches look beyond it.

    Source: Heinrich et al., Towards realtime multimodal fusion for image-guided interventions using self-similarities,
    MICCAI 2013.
    """
    fixed, warped, weight = _as_float(fixed, warped, mask)
    pairs = zip(_mind_ssc(fixed, radius, dilation), _mind_ssc(warped, radius, dilation), strict=True)
    difference = sum((one - other) ** 2 for one, other in pairs) / 12
    return jnp.mean(_mean(difference, weight), axis=-1)


def _mind_ssc(image: Float[Array, "N X Y Z C"], radius: int, dilation: int) -> list[Float[Array, "N X Y Z C"]]:
    """The 12 channels of the descriptor, each in (0, 1]; a list, because stacking them costs as much as making them."""
    size = image.shape[1:4]
    reach = radius + dilation
    padded = jnp.pad(image, [(0, 0), (reach, reach), (reach, reach), (reach, reach), (0, 0)], mode="edge")
    distances = []
    for first, second in itertools.combinations(range(3), 2):
        for sign in (-1, 1):
            # The pairs (+first, +second) and (-first, -second) compare patches one and the same offset apart, so one
            # map of patch distances, read at two places, serves both; likewise the two pairs of unequal sign.
            other = jnp.roll(padded, (-sign * dilation, dilation), axis=(first + 1, second + 1))
            patch = box_sum((padded - other) ** 2, 2 * radius + 1, (0, 0))
            for axis, step in ((first, -sign), (second, 1)):
                start = [dilation] * 3
                start[axis] += step * dilation
                window = [slice(low, low + n) for low, n in zip(start, size, strict=True)]
                distances.append(patch[(slice(None), *window)])
    least = functools.reduce(jnp.minimum, distances)
    variance = sum(distances) / len(distances) - least
    typical = jnp.mean(variance, axis=(1, 2, 3), keepdims=True)
    # The last term keeps a constant image finite, and is nothing beside any contrast.
    variance = jnp.clip(variance, typical / 1000, typical * 1000) + 1e-12
    return [jnp.exp((least - distance) / variance) for distance in distances]


def _check_window(name: str, window: int) -> None:
    if window < 1 or window % 2 == 0:
        raise InputError(f"{name} needs an odd window of at least 1 voxel; it is {window}.")


def _local_moments(fixed, warped, weight, window: int):
    """Means of both images in a cube about each voxel, their variances, and their covariance."""
    padding = (window // 2, window // 2)
    if weight is None:
        lines = [jnp.ones([size if a == axis else 1 for a, size in enumerate(fixed.shape)]) for axis in (1, 2, 3)]
        count = math.prod(box_sum(line, window, padding) for line in lines)
    else:
        count = box_sum(weight, window, padding)

    def local_mean(values):
        sums = box_sum(values if weight is None else values * weight, window, padding)
        return jnp.where(count > 0, sums / jnp.where(count > 0, count, 1.0), 0.0)

    fixed_mean, warped_mean = local_mean(fixed), local_mean(warped)
    covariance = local_mean(fixed * warped) - fixed_mean * warped_mean
    # Rounding can leave the variance of a flat window a little below 0.
    fixed_variance = jnp.maximum(local_mean(fixed**2) - fixed_mean**2, 0)
    warped_variance = jnp.maximum(local_mean(warped**2) - warped_mean**2, 0)
    return fixed_mean, warped_mean, fixed_variance, warped_variance, covariance


def _as_float(fixed: Image, warped: Image, mask: Mask | None):
    """The images in float32, and the mask as a weight `[N, X, Y, Z, 1]` or None."""
    weight = None if mask is None else mask.astype(jnp.float32)[..., None]
    return fixed.astype(jnp.float32), warped.astype(jnp.float32), weight


def _mean(values: Float[Array, "N X Y Z C"], weight) -> Float[Array, "N C"]:
    """Weighted mean over voxels; 0 where there is no weight."""
    if weight is None:
        return jnp.mean(values, axis=(1, 2, 3))
    total = jnp.sum(weight, axis=(1, 2, 3))
    return jnp.where(total > 0, jnp.sum(values * weight, axis=(1, 2, 3)) / jnp.where(total > 0, total, 1.0), 0.0)


def _centred(image: Float[Array, "N X Y Z C"], weight) -> Float[Array, "N X Y Z C"]:
    return image - _mean(image, weight)[:, None, None, None]


def _standardised(image: Float[Array, "N X Y Z C"], weight) -> Float[Array, "N X Y Z C"]:
    """Mean 0 and deviation 1 over the weighted voxels, as constants to the gradient; an image without contrast gives 0.

    For losses blind to gain and offset: it costs their gradients nothing, and in float32 saves the variances of
    images far from 0 (a CT in Hounsfield units) from cancelling.
    """
    constant = jax.lax.stop_gradient(image)
    flat = 1e-10 * _mean(constant**2, weight) + 1e-20
    scale = jax.lax.rsqrt(_mean(_centred(constant, weight) ** 2, weight) + flat)
    return (image - _mean(constant, weight)[:, None, None, None]) * scale[:, None, None, None]
