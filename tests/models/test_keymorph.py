"""KeyMorph: sizes, what its keypoints decide, and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from gridreg_jax.conv import conv3d
from gridreg_jax.errors import InputError
from gridreg_jax.models import build, keymorph
from gridreg_jax.models.keymorph import center_of_mass
from gridreg_jax.transforms.thin_plate import KERNELS
from gridreg_jax.transforms.warp import identity_grid

SHAPE = (17, 10, 21)
each_transform = pytest.mark.parametrize("transform", keymorph.TRANSFORMS)


@pytest.fixture(autouse=True)
def small(request, monkeypatch):
    """Two thin blocks, except where the published sizes are tested."""
    if "published" not in request.node.name:
        monkeypatch.setattr(keymorph, "WIDTHS", (3,))
        monkeypatch.setattr(keymorph, "HALVED", (0, 1))


def images(cases=1, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(0).uniform(size=(2, cases, *shape, 1)), jnp.float32)


@functools.cache
def params():
    return jax.jit(build("keymorph", keypoints=8).init)(jax.random.key(0), *images())


def predict(*pair, key=None, **fields):
    """In training with a key."""
    model, rngs = build("keymorph", keypoints=8, **fields), key if key is None else {"lambda": key}
    return jax.jit(lambda params, rngs: model.apply(params, *pair, train=key is not None, rngs=rngs))(params(), rngs)


def predict_of_points(fixed_points, moving_points, monkeypatch, *, key=None, **fields):
    """What follows from heat maps that are blobs about given points (voxels), one case."""

    class Blobs(keymorph.nn.Module):
        keypoints: int

        def __call__(self, images):
            grid = identity_grid(SHAPE)[..., None, :]
            squared = [((grid - points.astype(np.float32)) ** 2).sum(-1) for points in (fixed_points, moving_points)]
            return jnp.exp(-jnp.stack(squared) / (2 * 0.7**2))

    monkeypatch.setattr(keymorph, "HeatMaps", Blobs)
    model, rngs = build("keymorph", keypoints=len(fixed_points), **fields), key if key is None else {"lambda": key}
    return jax.jit(lambda rngs: model.apply({}, *images(), train=key is not None, rngs=rngs))(rngs)


def random_points(count=12, reach=1.0):
    """Voxels well inside the lattice, and points near them."""
    rng = np.random.default_rng(0)
    points = rng.integers(3, np.array(SHAPE) - 3, (count, 3)).astype(float)
    return points, points + rng.uniform(-reach, reach, (count, 3))


@pytest.mark.parametrize(
    ("keypoints", "expected"), [(64, 7_909_696), (128, 8_794_496), (256, 10_564_096), (512, 14_103_296)]
)
def test_published_number_of_parameters(keypoints, expected):
    image = jax.ShapeDtypeStruct((1, 16, 16, 16, 1), jnp.float32)
    shapes = jax.eval_shape(build("keymorph", keypoints=keypoints).init, jax.random.key(0), image, image)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


@pytest.mark.parametrize("cells", [(3, 2, 3), (1, 5, 4)])
def test_center_of_mass_is_scipys_from_corner_to_corner(cells):
    heat = np.random.default_rng(0).uniform(size=(2, *cells, 5)).astype(np.float32)
    found = center_of_mass(jnp.asarray(heat), SHAPE)
    for case, point in np.ndindex(2, 5):
        place = np.array(ndimage.center_of_mass(heat[case, ..., point]))
        expected = [
            at * (size - 1) / (n - 1) if n > 1 else (size - 1) / 2
            for at, n, size in zip(place, cells, SHAPE, strict=True)
        ]
        np.testing.assert_allclose(found[case, point], expected, rtol=1e-5)
    middle = np.broadcast_to((np.array(SHAPE) - 1) / 2, (1, 5, 3))
    np.testing.assert_allclose(center_of_mass(jnp.zeros((1, *cells, 5)), SHAPE), middle)


def test_heat_maps_are_rectified_and_halved_block_after_block():
    image, backbone = images()[0], params()["params"]["backbone"]
    found = jax.jit(keymorph.HeatMaps(8).apply)({"params": backbone}, image)
    x = np.asarray(image)
    for block in range(2):
        x = np.asarray(conv3d(jnp.asarray(x), backbone[f"block{block}"]["kernel"]))
        x = (x - x.mean((1, 2, 3), keepdims=True)) / np.sqrt(x.var((1, 2, 3), keepdims=True) + 1e-5)
        # Zeros at the far end change no maximum of what is not negative.
        x = np.pad(np.maximum(x, 0), [(0, 0), *((0, size % 2) for size in x.shape[1:4]), (0, 0)])
        x = np.max([x[:, i::2, j::2, k::2] for i, j, k in np.ndindex(2, 2, 2)], axis=0)
    assert found.min() >= 0
    np.testing.assert_allclose(found, x, atol=1e-4)


@each_transform
@pytest.mark.parametrize("shape", [(97, 115, 83), (16, 16, 16), (5, 31, 1)])
def test_any_image_size_with_the_published_network(transform, shape):
    def predict(fixed, moving):
        model = build("keymorph", keypoints=8, transform=transform)
        found = model.init_with_output(jax.random.key(0), fixed, moving)[0]
        return found.displacement, *found.keypoints

    image = jax.ShapeDtypeStruct((2, *shape, 1), jnp.float32)
    displacement, *keypoints = jax.eval_shape(predict, image, image)
    assert displacement.shape == (2, *shape, 3) and displacement.dtype == jnp.float32
    assert [points.shape for points in keypoints] == [(2, 8, 3)] * 2


@each_transform
def test_equal_images_give_the_identity(transform):
    fixed, _ = images()
    found = predict(fixed, fixed, transform=transform, weighted=True).displacement
    np.testing.assert_allclose(found, np.zeros((1, *SHAPE, 3)), atol=1e-3 if transform == "rigid" else 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_spline_takes_keypoints_to_keypoints(kernel, monkeypatch):
    points, targets = random_points()
    found = predict_of_points(points, targets, monkeypatch, kernel=kernel)
    for side, expected in zip(found.keypoints, (points, targets), strict=True):
        np.testing.assert_allclose(side[0], expected, atol=0.02)  # a blob on voxels
    moved = found.displacement[0][tuple(points.astype(int).T)]
    np.testing.assert_allclose(moved, targets - points, atol=0.05)
    assert found.affine is None


@pytest.mark.parametrize("weighted", [False, True])
def test_much_smoothing_is_the_affine(weighted, monkeypatch):
    both = [
        predict_of_points(*random_points(), monkeypatch, weighted=weighted, **fields)
        for fields in (dict(smoothing=1e6), dict(transform="affine"))
    ]
    np.testing.assert_allclose(both[0].displacement, both[1].displacement, atol=1e-3)


@each_transform
def test_a_known_map_of_the_keypoints_is_found(transform, monkeypatch):
    turned = Rotation.from_rotvec([0.1, -0.2, 0.15]).as_matrix()
    linear = turned if transform == "rigid" else turned @ np.diag([1.1, 0.9, 1.0])
    points, _ = random_points()
    center = (np.array(SHAPE) - 1) / 2
    targets = center + (points - center) @ linear.T + [0.5, -0.4, 0.3]
    found = predict_of_points(points, targets, monkeypatch, transform=transform)
    grid = np.asarray(identity_grid(SHAPE), np.float64)
    expected = center + (grid - center) @ linear.T + [0.5, -0.4, 0.3]
    np.testing.assert_allclose(grid + found.displacement[0], expected, atol=0.1)
    if transform != "tps":
        affine = np.asarray(found.affine[0], np.float64)
        np.testing.assert_allclose(grid @ affine[:3, :3].T + affine[:3, 3], grid + found.displacement[0], atol=1e-3)
    if transform == "rigid":  # in voxels, also on a lattice that is no cube
        np.testing.assert_allclose(affine[:3, :3] @ affine[:3, :3].T, np.eye(3), atol=1e-5)


@each_transform
def test_gradients_are_finite_and_reach_every_kernel(transform):
    fixed, moving = images()
    pair = jnp.concatenate([fixed, fixed, 0 * fixed]), jnp.concatenate([moving, fixed, 0 * fixed])
    model = build("keymorph", keypoints=8, transform=transform, weighted=True)

    def loss(params):
        return jnp.square(model.apply(params, *pair).displacement - 1).mean((1, 2, 3, 4))

    # Different images, equal ones, and empty ones.
    slopes = jax.tree.leaves(jax.jit(jax.jacrev(loss))(params()))
    assert all(jnp.isfinite(slope).all() for slope in slopes)
    # The instance norm takes every bias away again.
    assert all(jnp.abs(slope[0]).max() > 0 for slope in slopes if slope.ndim > 2)


def test_cases_of_a_batch_do_not_influence_each_other():
    fixed, moving = images(cases=2)
    both = predict(fixed, moving, weighted=True).displacement
    for case in range(2):
        alone = predict(fixed[case : case + 1], moving[case : case + 1], weighted=True).displacement
        np.testing.assert_allclose(both[case], alone[0], atol=1e-3)


@pytest.mark.parametrize("draw", ["uniform", "loguniform"])
def test_the_smoothing_is_drawn_in_training_alone(draw, monkeypatch):
    points = random_points()
    plain, still = (predict_of_points(*points, monkeypatch, **fields) for fields in ({}, dict(draw=draw)))
    np.testing.assert_array_equal(plain.displacement, still.displacement)
    drawn, again, other = (
        predict_of_points(*points, monkeypatch, draw=draw, key=jax.random.key(seed)).displacement for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(drawn, again)
    assert jnp.abs(drawn - plain.displacement).max() > 1e-4 < jnp.abs(drawn - other).max()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(transform="spline"), "model.transform: 'spline' is not known; known are tps, affine, rigid"),
        (dict(draw="normal"), "model.draw: 'normal' is not known"),
        (dict(kernel="r3"), "model.kernel: 'r3' is not known"),
        (dict(keypoints=3), "model.keypoints is 3: a map in three dimensions needs 4 or more"),
        (dict(smoothing=-1.0), "model.smoothing is -1.0"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    model = build("keymorph", **{"keypoints": 8} | fields)
    with pytest.raises(InputError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), *images())
