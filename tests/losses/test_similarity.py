import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from gridreg_jax import losses
from gridreg_jax.conv import local_norm
from gridreg_jax.errors import InputError

SHAPE = (11, 9, 10)
EVERY = sorted(losses.SIMILARITIES)


def image_pair(seed=0, shape=SHAPE):
    """Two related images, [X, Y, Z] in double precision."""
    rng = np.random.default_rng(seed)
    fixed, other = (ndimage.gaussian_filter(rng.normal(size=shape), 0.7) for _ in range(2))
    return fixed, 0.6 * fixed + 0.5 * other


def batch(*volumes):
    return jnp.asarray(np.stack(volumes)[..., None], jnp.float32)


@functools.cache
def compiled(loss, **static):
    return jax.jit(lambda fixed, warped, mask=None: loss(fixed, warped, mask=mask, **static))


@functools.cache
def compiled_gradient(loss, **static):
    return jax.jit(jax.grad(lambda warped, fixed, mask=None: loss(fixed, warped, mask=mask, **static).sum()))


def value(loss, fixed, warped, mask=None, **static):
    return float(compiled(loss, **static)(batch(fixed), batch(warped), mask)[0])


def gradient(loss, fixed, warped, mask=None, **static):
    """Of the loss by the warped image."""
    return np.asarray(compiled_gradient(loss, **static)(batch(warped), batch(fixed), mask))[0, ..., 0]


def assert_gradient_is_slope(found, oracle, warped, seed=7, step=1e-6):
    """Directional derivatives of a double-precision oracle, by central differences."""
    rng = np.random.default_rng(seed)
    for _ in range(4):
        direction = rng.normal(size=warped.shape)
        slope = (oracle(warped + step * direction) - oracle(warped - step * direction)) / (2 * step)
        scale = np.linalg.norm(found) * np.linalg.norm(direction)
        assert abs(np.sum(found * direction) - slope) < 1e-4 * scale


def local_moments(fixed, warped, window):
    """Means, variances and covariance in cubes cut at the border."""

    def local(volume):
        def box(v):
            return ndimage.uniform_filter(v, window, mode="constant")

        return box(volume) / box(np.ones(volume.shape))

    means, variances = zip(*((local(v), local(v * v) - local(v) ** 2) for v in (fixed, warped)), strict=True)
    return means, variances, local(fixed * warped) - means[0] * means[1]


def lncc_oracle(fixed, warped, window=9):
    fixed, warped = fixed / fixed.std(), warped / warped.std()
    _, (v, w), covariance = local_moments(fixed, warped, window)
    return 1 - np.mean((np.abs(covariance) + 1e-4) ** 2 / ((v + 1e-4) * (w + 1e-4)))


def ssim_map(fixed, warped, window=7):
    (m, n), (v, w), covariance = local_moments(fixed, warped, window)
    return (2 * m * n + 0.01**2) * (2 * covariance + 0.03**2) / ((m**2 + n**2 + 0.01**2) * (v + w + 0.03**2))


def nmi_oracle(fixed, warped, bins, span=None):
    def shares(volume, low, high):
        position = (volume.ravel() - low) / (high - low) * (bins - 1)
        return np.maximum(1 - np.abs(position[:, None] - np.arange(bins)), 0)

    low, high = span or (warped.min(), warped.max())
    joint = shares(fixed, fixed.min(), fixed.max()).T @ shares(warped, low, high)
    return 2 - nmi_of(joint)


def nmi_of(joint):
    def entropy(counts):
        p = counts[counts > 0] / joint.sum()
        return -np.sum(p * np.log(p))

    return (entropy(joint.sum(0)) + entropy(joint.sum(1))) / entropy(joint)


def mind_descriptors(volume, radius=2, dilation=2):
    """[X, Y, Z, 12] straight from the definition, patch by patch, on a volume that repeats its border for ever."""
    size = np.array(volume.shape)

    def patches(offset):
        steps = itertools.product(range(-radius, radius + 1), repeat=3)
        around = np.indices(volume.shape)[..., None] + (np.array(list(steps)) + offset).T[:, None, None, None]
        return volume[tuple(np.clip(around, 0, (size - 1)[:, None, None, None, None]))]

    six = [sign * dilation * np.eye(3, dtype=int)[axis] for axis in range(3) for sign in (-1, 1)]
    pairs = [(a, b) for a, b in itertools.combinations(six, 2) if a @ b == 0]
    assert len(pairs) == 12
    distance = np.stack([((patches(a) - patches(b)) ** 2).sum(-1) for a, b in pairs], axis=-1)
    distance -= distance.min(-1, keepdims=True)
    variance = distance.mean(-1, keepdims=True)
    return np.exp(-distance / np.clip(variance, variance.mean() / 1000, variance.mean() * 1000))


def mind_oracle(fixed, warped, mask=None, **options):
    difference = (mind_descriptors(fixed, **options) - mind_descriptors(warped, **options)) ** 2
    return np.average(difference.mean(-1), weights=mask)


@pytest.mark.parametrize("name", EVERY)
def test_one_value_a_case_averaged_over_channels_in_float32(name):
    (fixed, warped), (other, _) = image_pair(), image_pair(1)
    loss = losses.SIMILARITIES[name]
    near, far = value(loss, fixed, warped), value(loss, other, warped)
    cases = jnp.concatenate([batch(fixed, other), batch(other, other)], axis=-1)
    found = compiled(loss)(cases, jnp.concatenate([batch(warped, warped)] * 2, axis=-1))
    assert found.shape == (2,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, [(near + far) / 2, far], rtol=1e-5)
    half_precision = jax.ShapeDtypeStruct((1, *SHAPE, 1), jnp.bfloat16)
    assert jax.eval_shape(loss, half_precision, half_precision).dtype == jnp.float32


@pytest.mark.parametrize("name", EVERY)
def test_more_alike_is_less(name):
    fixed, warped = image_pair()
    loss = losses.SIMILARITIES[name]
    unrelated = image_pair(5)[0]
    assert value(loss, fixed, fixed) < value(loss, fixed, warped) < value(loss, fixed, unrelated)


@pytest.mark.parametrize("name", EVERY)
def test_no_nan_without_contrast(name):
    image, cases = image_pair()[0], []
    left = np.arange(SHAPE[0])[:, None, None] < 6
    for level in (0.0, 0.3, -1000.0):
        images = (np.full(SHAPE, level), np.where(left, level, image), image)
        cases += itertools.product(images, images, (np.ones(SHAPE), np.zeros(SHAPE), left * np.ones(SHAPE)))
    fixed, warped, mask = (batch(*volumes) for volumes in zip(*cases, strict=True))
    assert np.isfinite(compiled(losses.SIMILARITIES[name])(fixed, warped, mask[..., 0])).all()
    assert np.isfinite(compiled_gradient(losses.SIMILARITIES[name])(warped, fixed, mask[..., 0])).all()


@pytest.mark.parametrize("name", ["ncc", "lncc", "nmi"])
def test_a_flat_image_is_unrelated(name):
    image = image_pair()[0]
    assert value(losses.SIMILARITIES[name], np.full(SHAPE, 0.3), image) == pytest.approx(1, abs=1e-3)
    assert value(losses.SIMILARITIES[name], image, np.full(SHAPE, 0.3)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["mse", "ncc", "lncc", "nmi", "ssim"])
def test_outside_of_the_mask_has_no_influence(name):
    fixed, warped = image_pair()
    mask = np.random.default_rng(3).random(SHAPE) < 0.5
    loss, weight = losses.SIMILARITIES[name], jnp.asarray(mask[None])
    inside = value(loss, fixed, warped, mask=weight)
    other = value(loss, np.where(mask, fixed, 9), np.where(mask, warped, -7), mask=weight)
    assert inside == pytest.approx(other, rel=1e-5)
    assert abs(inside - value(loss, fixed, warped)) > 1e-4
    slope = gradient(loss, fixed, warped, mask=weight)
    assert not slope[~mask].any() and slope[mask].any()
    assert inside == pytest.approx(value(loss, fixed, warped, mask=2.0 * weight), rel=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_a_full_mask_is_no_mask(name):
    fixed, warped = image_pair()
    loss = losses.SIMILARITIES[name]
    full = value(loss, fixed, warped, mask=jnp.ones((1, *SHAPE), bool))
    assert full == pytest.approx(value(loss, fixed, warped), rel=1e-5)


def test_mse_and_its_mask():
    fixed, warped = image_pair()
    mask = np.random.default_rng(3).random(SHAPE)
    assert value(losses.mse, fixed, warped) == pytest.approx(np.mean((fixed - warped) ** 2), rel=1e-5)
    weighted = np.average((fixed - warped) ** 2, weights=mask)
    assert value(losses.mse, fixed, warped, mask=jnp.asarray(mask[None])) == pytest.approx(weighted, rel=1e-5)


def test_uncertainty_weighted_mse():
    fixed, warped = image_pair()
    variance = 0.1 + np.random.default_rng(3).random((*SHAPE, 3))
    found = losses.uncertainty_weighted_mse(batch(fixed), batch(warped), jnp.asarray(variance[None]), penalty=0.3)
    normed, other = (np.asarray(local_norm(batch(image), 5), float)[0, ..., 0] for image in (fixed, warped))
    spread = sum(variance[..., axis] * slope**2 for axis, slope in enumerate(np.gradient(normed))) + 0.02
    expected = np.mean((normed - other) ** 2 / (2 * spread) + 0.3 * 0.5 * np.log(spread))
    assert float(found[0]) == pytest.approx(expected, rel=1e-4)


def test_an_uncertain_displacement_across_a_single_slice_changes_nothing():
    fixed, warped = (batch(image[:, :, :1]) for image in image_pair())
    across = jnp.zeros((*fixed.shape[:4], 3)).at[..., 2].set(9.0)
    found = [losses.uncertainty_weighted_mse(fixed, warped, variance) for variance in (across, 0 * across)]
    np.testing.assert_array_equal(*found)
    assert np.isfinite(found[0]).all()


def test_the_likeliest_variance_is_the_squared_error_of_the_displacement():
    """An image displaced at random: the best constant variance is about the mean square of a component's error."""
    rng = np.random.default_rng(0)
    shape, deviation = (40, 40, 40), 0.3
    image = ndimage.gaussian_filter(rng.normal(size=shape), 1.0)
    image = (image - image.min()) / np.ptp(image)
    error = np.stack([ndimage.gaussian_filter(rng.normal(size=shape), 4.0) for _ in range(3)])
    error *= deviation / error.std()
    displaced = ndimage.map_coordinates(image, np.indices(shape) + error, order=3, mode="nearest")

    def loss(factor):
        variance = jnp.full((1, *shape, 3), factor * deviation**2)
        return float(losses.uncertainty_weighted_mse(batch(image), batch(displaced), variance)[0])

    candidates = [0.25, 0.5, 1.0, 2.0, 4.0]
    assert min(candidates, key=loss) == 1.0


def test_ncc_is_one_less_the_correlation():
    fixed, warped = image_pair()

    def oracle(image):
        return 1 - np.corrcoef(fixed.ravel(), image.ravel())[0, 1]

    assert value(losses.ncc, fixed, warped) == pytest.approx(oracle(warped), abs=1e-5)
    assert value(losses.ncc, fixed, 2 - 3 * fixed) == pytest.approx(2, abs=1e-5)
    assert_gradient_is_slope(gradient(losses.ncc, fixed, warped), oracle, warped)


@pytest.mark.parametrize(("window", "shape"), [(3, SHAPE), (9, SHAPE), (9, (5, 4, 6))])
def test_lncc_against_scipy(window, shape):
    fixed, warped = image_pair(shape=shape)
    expected = lncc_oracle(fixed, warped, window)
    assert value(losses.lncc, fixed, warped, window=window) == pytest.approx(expected, abs=1e-5)
    slope = gradient(losses.lncc, fixed, warped, window=window)
    assert_gradient_is_slope(slope, lambda image: lncc_oracle(fixed, image, window), warped)


def test_lncc_of_hounsfield_units():
    fixed, warped = image_pair()
    expected = lncc_oracle(fixed, warped)
    assert value(losses.lncc, 500 * fixed - 1000, 30 * warped + 5000) == pytest.approx(expected, abs=1e-4)


def test_lncc_is_least_for_the_image_itself():
    image = image_pair()[0]
    image *= np.geomspace(1e-4, 1, SHAPE[0])[:, None, None]  # from contrast that counts as flat to one that does not
    assert value(losses.lncc, image, image, window=5) == pytest.approx(0, abs=1e-6)
    steep = np.abs(gradient(losses.lncc, image, 1.01 * image + 0.05 * image**2, window=5)).max()
    assert np.abs(gradient(losses.lncc, image, image, window=5)).max() < 1e-3 * steep


def test_lncc_ignores_a_gain_and_offset_that_differ_from_place_to_place():
    fixed, warped = image_pair(shape=(14, 9, 8))
    x = np.arange(14)[:, None, None]
    mask = jnp.asarray(np.broadcast_to((x < 5) | (x >= 9), fixed.shape)[None])  # a gap no window of 5 bridges
    local = np.where(x < 7, 4 * warped + 1, 2 - 3 * warped)  # so strong everywhere that no contrast counts as noise
    expected = value(losses.lncc, fixed, warped, window=5, mask=mask)
    assert value(losses.lncc, fixed, local, window=5, mask=mask) == pytest.approx(expected, abs=1e-4)
    assert abs(value(losses.ncc, fixed, local, mask=mask) - value(losses.ncc, fixed, warped, mask=mask)) > 0.1


@pytest.mark.parametrize(("window", "shape"), [(3, SHAPE), (7, SHAPE), (7, (5, 4, 6))])
def test_ssim_against_scipy(window, shape):
    fixed, warped = image_pair(shape=shape)
    expected = 1 - ssim_map(fixed, warped, window).mean()
    assert value(losses.ssim, fixed, warped, window=window) == pytest.approx(expected, abs=1e-5)
    slope = gradient(losses.ssim, fixed, warped, window=window)
    assert_gradient_is_slope(slope, lambda image: 1 - ssim_map(fixed, image, window).mean(), warped)


def test_ssim_is_that_of_scikit_image_away_from_the_border():
    metrics = pytest.importorskip("skimage.metrics")
    fixed, warped = image_pair()
    options = dict(win_size=7, data_range=1.0, use_sample_covariance=False, full=True)
    _, expected = metrics.structural_similarity(fixed, warped, **options)
    inside = (slice(3, -3),) * 3
    np.testing.assert_allclose(ssim_map(fixed, warped)[inside], expected[inside], atol=1e-10)


def test_ssim_sees_brightness_and_contrast():
    image = 0.5 + 0.1 * image_pair()[0]
    assert value(losses.ssim, image, image) == pytest.approx(0, abs=1e-5)
    for other in (image + 0.2, 0.5 + 0.3 * (image - 0.5), 1 - image):
        assert value(losses.ssim, image, other) > 0.02


@pytest.mark.parametrize("loss", [losses.lncc, losses.ssim])
@pytest.mark.parametrize("window", [4, 0, -1])
def test_an_odd_window_is_needed(loss, window):
    with pytest.raises(InputError, match=f"{loss.__name__} needs an odd window of at least 1 voxel; it is {window}"):
        loss(jnp.zeros((1, 5, 5, 5, 1)), jnp.zeros((1, 5, 5, 5, 1)), window=window)


def test_nmi_of_images_on_bin_centres():
    rng = np.random.default_rng(0)
    fixed, noise = rng.integers(0, 8, SHAPE), rng.integers(0, 2, SHAPE)
    fixed.flat[:2] = 0, 7
    permuted = rng.permutation(8)[fixed]
    assert value(losses.nmi, fixed, fixed, bins=8) == pytest.approx(0, abs=1e-5)
    assert value(losses.nmi, fixed, permuted, bins=8) == pytest.approx(0, abs=1e-5)
    warped = np.minimum(fixed + noise, 7)
    joint = np.histogram2d(fixed.ravel(), warped.ravel(), bins=8)[0]
    assert value(losses.nmi, fixed, warped, bins=8) == pytest.approx(2 - nmi_of(joint), abs=1e-5)


def test_nmi_of_independent_images():
    x, y, _ = np.indices(SHAPE)
    assert value(losses.nmi, x**2, np.sin(y)) == pytest.approx(1, abs=1e-5)


def test_nmi_between_bin_centres():
    fixed, warped = image_pair()
    assert value(losses.nmi, fixed, warped, bins=12) == pytest.approx(nmi_oracle(fixed, warped, 12), abs=1e-5)
    # The span of the bins is a constant of the gradient; a fixed one in the oracle, with the two extremes held still.
    span, extreme = (warped.min(), warped.max()), (warped == warped.min()) | (warped == warped.max())
    slope = gradient(losses.nmi, fixed, warped, bins=12)

    def oracle(image):
        return nmi_oracle(fixed, np.where(extreme, warped, image), 12, span)

    assert_gradient_is_slope(np.where(extreme, 0, slope), oracle, warped)


def test_nmi_needs_two_bins():
    with pytest.raises(InputError, match="2 bins"):
        losses.nmi(jnp.zeros((1, 5, 5, 5, 1)), jnp.zeros((1, 5, 5, 5, 1)), bins=1)


@pytest.mark.parametrize("options", [{}, {"radius": 1, "dilation": 3}])
def test_mind_against_its_definition(options):
    fixed, warped = image_pair(shape=(7, 6, 8))
    expected = mind_oracle(fixed, warped, **options)
    assert value(losses.mind, fixed, warped, **options) == pytest.approx(expected, rel=1e-4)
    mask = np.random.default_rng(3).random(fixed.shape) < 0.3
    expected, weight = mind_oracle(fixed, warped, mask, **options), jnp.asarray(mask[None])
    assert value(losses.mind, fixed, warped, mask=weight, **options) == pytest.approx(expected, rel=1e-4)


def test_gradient_of_mind():
    fixed, warped = image_pair(shape=(7, 6, 8))
    slope = gradient(losses.mind, fixed, warped)
    assert_gradient_is_slope(slope, lambda image: mind_oracle(fixed, image), warped)


def test_mind_ignores_gain_and_offset():
    fixed, warped = image_pair()
    expected = value(losses.mind, fixed, warped)
    assert value(losses.mind, fixed, 3 - 20 * warped) == pytest.approx(expected, rel=1e-3)
    assert value(losses.mind, fixed, 3 - 20 * fixed) < 1e-6 < expected
