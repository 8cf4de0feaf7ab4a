"""Augmentation: nothing with all strengths at 0, and every example a function of its own key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gridreg_jax import augment as augmentation

SHAPE, CASES = (8, 7, 9), 3
STRONG = dict(flip=0.5, affine=0.1, shift=1.0, elastic=1.0, contrast=0.3, noise=0.05)


@functools.cache
def compiled(**strengths):
    return jax.jit(lambda batch, keys: augmentation.augment(batch, keys, **strengths))


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    images = {name: rng.uniform(size=(CASES, *SHAPE, 1)).astype(np.float32) for name in ("fixed", "moving")}
    labels = {f"{name}_labels": rng.choice([0, 2, 5], size=(CASES, *SHAPE)).astype(np.int32) for name in images}
    return jax.tree.map(jnp.asarray, images | labels)


def keys(seed=0):
    return jax.random.split(jax.random.key(seed), CASES)


def test_no_strength_changes_nothing():
    changed = compiled()(batch(), keys())
    for name, array in batch().items():
        np.testing.assert_array_equal(changed[name], array, err_msg=name)


def test_a_flip_mirrors_images_and_labels_of_the_pair_left_to_right():
    changed = compiled(flip=1.0)(batch(), keys())
    for name, array in batch().items():
        np.testing.assert_array_equal(changed[name], array[:, ::-1], err_msg=name)


def test_half_of_the_pairs_are_flipped_and_fixed_and_moving_always_together():
    one = {name: array[:1] for name, array in batch().items()}
    many = {name: np.tile(array, (200,) + (1,) * (array.ndim - 1)) for name, array in one.items()}
    changed = jax.device_get(compiled(flip=0.5)(many, jax.random.split(jax.random.key(3), 200)))
    flipped = {name: (changed[name] != array).reshape(200, -1).any(axis=1) for name, array in many.items()}
    assert 70 < flipped["fixed"].sum() < 130
    for name, which in flipped.items():
        np.testing.assert_array_equal(which, flipped["fixed"], err_msg=name)


@pytest.mark.parametrize("strength", ["affine", "shift", "elastic", "contrast", "noise"])
def test_each_strength_changes_both_images_each_in_its_own_way(strength):
    same = batch() | {"moving": batch()["fixed"], "moving_labels": batch()["fixed_labels"]}
    changed, same = jax.device_get((compiled(**{strength: STRONG[strength]})(same, keys()), same))
    for one, other in ((changed["fixed"], same["fixed"]), (changed["moving"], same["fixed"]), changed_pair(changed)):
        assert (np.abs(one - other).max(axis=(1, 2, 3, 4)) > 1e-3).all()
    # Only what moves in space moves the labels.
    moved = bool((changed["fixed_labels"] != same["fixed_labels"]).any())
    assert moved == (strength in ("affine", "shift", "elastic"))


def changed_pair(changed):
    return changed["fixed"], changed["moving"]


def test_labels_move_with_their_image():
    # An image that is its own label map, in blobs large enough to survive interpolation.
    labels = np.zeros((CASES, 16, 16, 16), np.int32)
    labels[:, 4:12, 3:9, 5:12] = 1
    image = jnp.asarray(labels[..., None], jnp.float32)
    same = dict(fixed=image, moving=image, fixed_labels=jnp.asarray(labels), moving_labels=jnp.asarray(labels))
    changed = compiled(flip=0.5, affine=0.1, shift=1.0, elastic=1.0)(same, keys())
    for name in ("fixed", "moving"):
        sure = np.abs(changed[name][..., 0] - 0.5) > 0.45
        assert sure.mean() > 0.5
        agreeing = changed[f"{name}_labels"] == (changed[name][..., 0] > 0.5)
        assert agreeing[sure].mean() > 0.99
        assert (changed[f"{name}_labels"] != labels).sum() > 100


def test_labels_keep_to_the_values_there_are():
    changed = compiled(**STRONG)(batch(), keys())
    for name in ("fixed_labels", "moving_labels"):
        assert changed[name].dtype == jnp.int32
        assert set(np.unique(changed[name])) <= {0, 2, 5}


def test_an_example_depends_on_its_own_key_only():
    order = np.array([2, 0, 1])
    changed = compiled(**STRONG)(batch(), keys())
    shuffled = compiled(**STRONG)({name: array[order] for name, array in batch().items()}, keys()[order])
    for name, array in changed.items():
        np.testing.assert_array_equal(shuffled[name], array[order], err_msg=name)


def test_the_same_keys_give_the_same_and_others_do_not():
    first, again, other = (compiled(**STRONG)(batch(), keys(seed)) for seed in (1, 1, 2))
    for name, array in first.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
        assert (other[name] != array).any()


def test_images_alone_are_enough():
    images = {name: array for name, array in batch().items() if "labels" not in name}
    changed = compiled(**STRONG)(images, keys())
    assert changed.keys() == images.keys()
    np.testing.assert_array_equal(changed["moving"], compiled(**STRONG)(batch(), keys())["moving"])


def test_points_are_where_the_changed_images_have_them():
    shape, places = (16, 14, 18), np.array([[5, 6, 9], [10, 8, 7]])
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    one = sum(np.exp(-((grid - place) ** 2).sum(-1) / 3) * height for place, height in zip(places, (1, 2), strict=True))
    volume = jnp.asarray(one[None, ..., None], jnp.float32)
    pairs = {"fixed": volume, "moving": volume, "points": jnp.asarray(places[None], jnp.float32)}
    for flip in (0.0, 1.0):
        changed = jax.device_get(compiled(flip=flip, affine=0.1, shift=1.0)(pairs, keys()[:1]))
        for name in ("fixed", "moving"):
            image, points = changed[name][0, ..., 0], changed[f"{name}_points"][0]
            for point, height in zip(points, (1, 2), strict=True):
                weight = np.exp(-((grid - point) ** 2).sum(-1) / 4) * image
                np.testing.assert_allclose(np.average(grid.reshape(-1, 3), 0, weight.ravel()), point, atol=0.15)
                assert image[tuple(np.rint(point).astype(int))] > 0.6 * height
        assert np.abs(changed["fixed_points"] - changed["moving_points"]).max() > 0.3
    still = compiled()(pairs, keys()[:1])
    np.testing.assert_allclose(still["moving_points"], pairs["points"], atol=1e-5)


def test_growth_is_of_the_spatial_strengths():
    half = compiled(**STRONG | dict(affine=0.05, shift=0.5, elastic=0.5))(batch(), keys())
    grow = jax.jit(lambda growth: augmentation.augment(batch(), keys(), **STRONG, growth=growth))
    np.testing.assert_allclose(grow(0.5)["fixed"], half["fixed"], atol=1e-5)
    assert np.abs(grow(1.0)["fixed"] - half["fixed"]).max() > 1e-2


def test_foreground_points_are_different_bright_voxels():
    volume = jnp.asarray(np.random.default_rng(0).uniform(size=(*SHAPE, 1)), jnp.float32)
    points, again, other = (augmentation.foreground_points(jax.random.key(seed), volume, 40) for seed in (0, 0, 1))
    np.testing.assert_array_equal(points, again)
    assert len(np.unique(points, axis=0)) == 40 and not np.array_equal(points, other)
    assert (volume[tuple(np.asarray(points, int).T)] > volume.mean()).all()
