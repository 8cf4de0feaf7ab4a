import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from gridreg_jax.losses import MOST_WARPED_LABELS, segmentation_loss, soft_dice, soft_dice_of_probabilities

NUM_LABELS = 4


@functools.partial(jax.jit, static_argnames="num_labels")
def compiled(fixed, moving, displacement, num_labels, **options):
    """Of one case, and its gradient for the displacement."""
    return jax.value_and_grad(lambda u: soft_dice(fixed, moving, u, num_labels=num_labels, **options)[0])(displacement)


def example(seed=0, shape=(9, 8, 7), moving_shape=(8, 9, 10)):
    rng = np.random.default_rng(seed)
    fixed, moving = (
        np.kron(rng.integers(0, NUM_LABELS + 1, [-(-n // 3) for n in s]), np.ones((3, 3, 3), int))[tuple(map(slice, s))]
        for s in (shape, moving_shape)
    )
    return fixed, moving, rng.normal(scale=1.5, size=(*shape, 3))


def oracle(fixed, moving, displacement, mask=1.0):
    """One-hot maps, each warped by scipy, in double precision."""
    points = np.moveaxis(np.indices(fixed.shape).transpose(1, 2, 3, 0) + displacement, -1, 0)
    values = []
    for label in range(1, NUM_LABELS + 1):
        f = (fixed == label) * mask
        w = ndimage.map_coordinates((moving == label).astype(float), points, order=1, mode="nearest") * mask
        if f.sum() + w.sum() > 0:
            values.append(2 * np.sum((fixed == label) * w) / (f.sum() + w.sum()))
    return 1 - np.mean(values)


def loss_and_slope(fixed, moving, displacement, num_labels=NUM_LABELS, **options):
    arrays = (np.int32(fixed[None]), np.int32(moving[None]), np.float32(displacement[None]))
    value, slope = compiled(*arrays, num_labels, **options)
    return float(value), np.asarray(slope[0])


def loss(*arrays, **options):
    return loss_and_slope(*arrays, **options)[0]


@pytest.mark.parametrize("shift", [0.0, -1.0, 2.0])
def test_the_gradient_of_many_labels_is_that_of_few_on_the_border_too(shift):
    """Both ways of warping; points on the border move their values as those inside do."""
    fixed, moving, displacement = example()
    assert NUM_LABELS == MOST_WARPED_LABELS
    shifted = np.full_like(displacement, shift)
    few, many = (loss_and_slope(fixed, moving, shifted, n)[1] for n in (NUM_LABELS, NUM_LABELS + 1))
    assert np.abs(few[0]).max() > 0
    np.testing.assert_allclose(many, few, atol=1e-6)


def test_against_one_hot_maps():
    fixed, moving, displacement = example()
    assert loss(fixed, moving, displacement) == pytest.approx(oracle(fixed, moving, displacement), abs=1e-5)


def test_gradient_against_finite_differences_of_one_hot_maps():
    fixed, moving, displacement = example()
    _, found = loss_and_slope(fixed, moving, displacement)
    rng = np.random.default_rng(1)
    for _ in range(4):
        step = 1e-7 * rng.normal(size=displacement.shape)
        slope = oracle(fixed, moving, displacement + step) - oracle(fixed, moving, displacement - step)
        tolerance = 1e-4 * 2 * np.linalg.norm(step) * np.linalg.norm(found)
        assert 2 * np.sum(found * step) == pytest.approx(slope, abs=tolerance)


def test_cases_do_not_mix():
    examples = [example(seed) for seed in range(3)]
    stacked = [jnp.asarray(np.stack(part)) for part in zip(*examples, strict=True)]
    found = jax.jit(soft_dice, static_argnames="num_labels")(*stacked, num_labels=NUM_LABELS)
    assert found.shape == (3,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, [oracle(*one) for one in examples], atol=1e-5)


def test_mask_weights_both_sums():
    fixed, moving, displacement = example()
    mask = np.random.default_rng(2).random(fixed.shape) < 0.4
    found, slope = loss_and_slope(fixed, moving, displacement, mask=mask[None])
    assert found == pytest.approx(oracle(fixed, moving, displacement, mask), abs=1e-5)
    elsewhere = np.where(mask, fixed, 1)
    assert found == loss(elsewhere, moving, displacement, mask=mask[None])
    assert not slope[~mask].any()


def test_identity_is_perfect_and_disjoint_is_worst():
    fixed, _, displacement = example()
    assert loss(fixed, fixed, np.zeros_like(displacement)) == pytest.approx(0, abs=1e-6)
    one, two = np.where(fixed > 0, 1, 0), np.where(fixed > 0, 0, 1)
    assert loss(one, two, np.zeros_like(displacement)) == pytest.approx(1, abs=1e-6)


def test_labels_absent_from_both_are_left_out():
    fixed, moving, displacement = example()
    fixed, moving = np.where(fixed == 2, 0, fixed), np.where(moving == 2, 0, moving)
    assert loss(fixed, moving, displacement) == pytest.approx(oracle(fixed, moving, displacement), abs=1e-5)


def test_other_ids_are_background():
    fixed, moving, displacement = example()
    strange_fixed, strange_moving = np.where(fixed == 0, NUM_LABELS + 5, fixed), np.where(moving == 0, -3, moving)
    assert loss(strange_fixed, strange_moving, displacement) == loss(fixed, moving, displacement)


def test_nothing_to_score():
    fixed, moving, displacement = example()
    found, slope = loss_and_slope(0 * fixed, 0 * moving, displacement)
    assert found == 0 and not slope.any()


def test_memory_does_not_grow_with_the_labels():
    labels = jax.ShapeDtypeStruct((1, 24, 24, 24), jnp.int32)
    field = jax.ShapeDtypeStruct((1, 24, 24, 24, 3), jnp.float32)

    def mebibytes(num_labels):
        slope = jax.grad(lambda u, f, m: soft_dice(f, m, u, num_labels=num_labels).sum())
        return jax.jit(slope).lower(field, labels, labels).compile().memory_analysis().temp_size_in_bytes / 2**20

    one_map = 24**3 * 4 / 2**20
    assert mebibytes(200) < mebibytes(20) + 10 * one_map


def probabilities(seed, cases=2, shape=(9, 8, 7)):
    drawn = np.random.default_rng(seed).dirichlet(np.ones(NUM_LABELS + 1), (cases, *shape))
    return jnp.asarray(drawn, jnp.float32)


def test_overlap_of_probabilities():
    fixed, warped = probabilities(0)[..., 1:], probabilities(1)[..., 1:]
    mask = jnp.asarray(np.random.default_rng(2).uniform(size=fixed.shape[:-1]), jnp.float32)
    for weights in (None, mask):
        w = 1 if weights is None else weights[..., None]
        sums = [np.sum(w * product, axis=(1, 2, 3), dtype=float) for product in (fixed * warped, fixed**2, warped**2)]
        expected = 1 - np.mean((2 * sums[0] + 1) / (sums[1] + sums[2] + 1), axis=-1)
        np.testing.assert_allclose(soft_dice_of_probabilities(fixed, warped, mask=weights), expected, rtol=1e-5)
    # However unsure both are.
    np.testing.assert_allclose(soft_dice_of_probabilities(fixed, fixed), 0, atol=1e-6)
    assert (soft_dice_of_probabilities(fixed, jnp.zeros_like(fixed)) > 0.9).all()


def test_a_label_that_is_nowhere_likely_does_not_count_as_one_that_is_missed():
    fixed = probabilities(0)[..., 1:]
    noise = [1e-4 * jnp.asarray(np.random.default_rng(seed).uniform(size=fixed.shape), jnp.float32) for seed in (1, 2)]
    both = (jnp.concatenate([fixed, one], axis=-1) for one in noise)
    np.testing.assert_allclose(soft_dice_of_probabilities(*both), 0, atol=1e-5)


def test_segmentation_loss_is_cross_entropy_and_overlap():
    predicted = probabilities(0)
    # The last label does not occur: its overlap is not asked for.
    labels = jnp.asarray(np.random.default_rng(1).integers(0, NUM_LABELS, predicted.shape[:-1]), jnp.int32)
    truth = np.eye(NUM_LABELS + 1)[labels]
    entropy = -np.log((truth * predicted).sum(-1)).mean((1, 2, 3))
    agreeing, total = ((truth * predicted)[..., 1:-1].sum((1, 2, 3)), (truth + predicted)[..., 1:-1].sum((1, 2, 3)))
    expected = entropy + 1 - (2 * agreeing / total).mean(-1)
    logits = np.log(predicted) + np.random.default_rng(2).normal(size=(*labels.shape, 1))  # up to a constant
    np.testing.assert_allclose(segmentation_loss(jnp.asarray(logits, jnp.float32), labels), expected, rtol=1e-4)
