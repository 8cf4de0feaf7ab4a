"""GridReg: sizes, symmetries and the identity it starts from."""

import dataclasses
import functools
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import ndimage

from gridreg_jax.errors import InputError
from gridreg_jax.models import build, describe, layers
from gridreg_jax.models.gridreg import DecoderLevel
from gridreg_jax.models.layers import (
    FREQUENCIES,
    CrossAttention,
    FeatureMap,
    position_encoding,
    resample_features,
)
from gridreg_jax.transforms.interpolation import INTERPOLATORS, axis_weights, control_positions
from gridreg_jax.transforms.warp import warp

SHAPE = (16, 20, 16)
TINY = dict(levels=4, width=4, projection=8, decoder=8, heads=2)


def images(shape=SHAPE, cases=1):
    return jnp.asarray(np.random.default_rng(0).uniform(size=(2, cases, *shape, 1)), jnp.float32)


def abstract(function, *shapes):
    """Shapes of what a function of images of these shapes returns; nothing is computed."""
    return jax.eval_shape(function, *(jax.ShapeDtypeStruct((1, *shape, 1), jnp.float32) for shape in shapes))


def shapes_of_params(grid_size=(5, 5, 5), name="gridreg", **fields):
    def init(fixed, moving):
        return build(name, **fields).init(jax.random.key(0), fixed, moving, grid_size=grid_size)

    return abstract(init, SHAPE, SHAPE)


def random_params(**fields):
    """Parameters away from those at the start, head included."""
    rng = np.random.default_rng(1)
    shapes = shapes_of_params(**fields)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("levels", "width", "expected"),
    [
        (4, 16, 97_776),
        (5, 16, 208_432),
        (6, 16, 429_744),
        (7, 16, 872_240),
        (8, 16, 1_757_232),
        (9, 16, 3_526_960),
        (5, 8, 52_376),
        (5, 32, 831_584),
        (8, 32, 7_025_760),
    ],
)
def test_encoder_has_as_many_parameters_as_the_published_one(levels, width, expected):
    assert count(shapes_of_params(levels=levels, width=width)["params"]["encoder"]) == expected


def test_the_pointwise_network_has_the_size_that_the_paper_states():
    for grid_size in [(5, 5, 5), (15, 15, 15)]:
        params = shapes_of_params(grid_size, name="gridreg_pointwise", levels=5, width=16)["params"]
        assert count(params) == 252_960
    assert count(params["encoder"]) == 208_432


VARIANTS = {
    "local": dict(window=3),
    "global": dict(window=0),
    "no attention": dict(window=1),
    "no skip projections": dict(skips=()),
    "linear projections": dict(products=False),
    "pooled": dict(encoder="pooled"),
    "pointwise": dict(name="gridreg_pointwise"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_set_of_parameters_serves_every_grid_size(variant):
    fields = dict(name="gridreg") | TINY | VARIANTS[variant]
    model, params = build(**fields), shapes_of_params(**fields)
    for grid_size in [(5, 5, 5), (8, 8, 8), (10, 10, 10), (15, 15, 15), (7, 9, 6)]:
        assert shapes_of_params(grid_size, **fields) == params

        def predict(fixed, moving, grid_size=grid_size):
            zeros = jax.tree.map(jnp.zeros_like, params)
            return jax.tree.leaves(model.apply(zeros, fixed, moving, grid_size=grid_size))

        shapes = [leaf.shape for leaf in abstract(predict, SHAPE, SHAPE)]
        assert shapes == [(1, *SHAPE, 3), (1, *grid_size, 3), (1, *grid_size, 3)]


@pytest.mark.parametrize("shape", [(17, 19, 15), (16, 16, 16), (33, 21, 9)])
@pytest.mark.parametrize("downsampled", [2, 4])
def test_any_image_size(shape, downsampled):
    def predict(fixed, moving):
        model = build("gridreg", **TINY, downsampled=downsampled)
        return model.init_with_output(jax.random.key(0), fixed, moving, grid_size=(5, 4, 6))[0].displacement

    displacement = abstract(predict, shape, shape)
    assert (displacement.shape, displacement.dtype) == ((1, *shape, 3), jnp.float32)


@pytest.mark.parametrize("window", [3, 0])
def test_starts_at_the_identity_exactly(window):
    model = build("gridreg", **TINY, window=window)
    start = jax.jit(lambda *pair: model.init_with_output(jax.random.key(0), *pair, grid_size=(5, 4, 6))[0].displacement)
    np.testing.assert_array_equal(start(*images()), np.zeros((1, *SHAPE, 3)))


@pytest.mark.parametrize("interpolator", INTERPOLATORS)
def test_a_constant_control_grid_gives_a_constant_displacement_in_voxels(interpolator):
    model = build("gridreg", **TINY, interpolator=interpolator)
    params = random_params(**TINY)["params"]
    halves = jnp.asarray([0.1, -0.2, 0.3])  # of the lattice
    params["head"] = {"kernel": jnp.zeros((8, 3)), "bias": halves}
    predict = jax.jit(lambda *pair: jax.tree.leaves(model.apply({"params": params}, *pair, grid_size=(5, 4, 6))))
    for found in predict(*images()):
        expected = np.broadcast_to(halves * (np.array(SHAPE) - 1) / 2, found.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_cases_of_a_batch_do_not_influence_each_other():
    model, params = build("gridreg", **TINY), random_params(**TINY)
    predict = jax.jit(lambda *pair: model.apply(params, *pair, grid_size=(5, 4, 6)).control_grid)
    fixed, moving = images(cases=2)
    both, other = predict(fixed, moving), predict(fixed, moving.at[1].set(fixed[1]))
    assert np.abs(both[1] - other[1]).max() > 1e-2
    np.testing.assert_allclose(both[0], other[0], atol=1e-6)


@pytest.mark.parametrize("window", [3, 0])
def test_the_order_of_the_heads_does_not_matter(window):
    heads, features = 4, 8
    rng = np.random.default_rng(0)
    queries, tokens = jnp.asarray(rng.normal(size=(2, 1, 4, 5, 3, 6)), jnp.float32)
    attention = CrossAttention(features, heads, window)
    params = jax.jit(attention.init)(jax.random.key(0), queries, tokens)["params"]
    if window:
        params = {**params, "bias": jnp.asarray(rng.normal(size=(window**3, heads)), jnp.float32)}
    order = np.array([2, 0, 3, 1])
    columns = np.arange(features).reshape(heads, -1)[order].ravel()
    permuted = {name: {"kernel": params[name]["kernel"][:, columns]} for name in ("query", "key", "value")}
    permuted["out"] = {**params["out"], "kernel": params["out"]["kernel"][columns]}
    if window:
        permuted["bias"] = params["bias"][:, order]
    apply = jax.jit(lambda params: attention.apply({"params": params}, queries, tokens))
    before, after = apply(params), apply(permuted)
    np.testing.assert_allclose(before, after, atol=1e-5)
    # With the queries left in their order, heads meet keys of others: they do differ.
    assert np.abs(before - apply({**permuted, "query": params["query"]})).max() > 1e-2


def test_global_attention_knows_where_a_token_lies():
    rng = np.random.default_rng(0)
    grid, lattice = [np.linspace(0, 1, 5)] * 3, [np.linspace(0, 1, 4)] * 3
    encoding, around = (jnp.asarray(position_encoding(points))[None] for points in (grid, lattice))
    state = jnp.broadcast_to(jnp.asarray(rng.normal(size=8), jnp.float32), (1, 5, 5, 5, 8))
    projected = jnp.asarray(rng.normal(size=(1, 4, 4, 4, 8)), jnp.float32)
    level = DecoderLevel(8, 2, 0, [np.linspace(0, 4, 4)] * 3)
    params = level.init(jax.random.key(0), state, projected, encoding, around)
    apply = jax.jit(lambda projected, around: level.apply(params, state, projected, encoding, around)[0])
    mirrored = apply(projected[:, ::-1], around)
    together = apply(projected[:, ::-1], around[:, ::-1])
    still = apply(projected, around)
    # Tokens are a set: their order says nothing, their position codes say it all.
    np.testing.assert_allclose(together, still, atol=1e-5)
    assert np.abs(mirrored - still).max() > 1e-2


def test_a_grid_too_small_for_the_cubic_spline_is_refused():
    model = build("gridreg", **TINY, interpolator="bspline")
    with pytest.raises(InputError, match="control grid 4x3x4 is too small: bspline needs at least 4"):
        abstract(lambda *pair: model.init(jax.random.key(0), *pair, grid_size=(4, 3, 4)), SHAPE, SHAPE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(levels=10), "the encoder has 1 to 9 levels, not 10"),
        (dict(levels=0), "model.levels is 0: give 1 or more"),
        (dict(heads=3), "8 features cannot be shared by 3 heads"),
        (dict(window=4), r"the attention window must be odd, or 0 \(global\), not 4"),
        (dict(bound=-1.0), "model.bound is -1.0"),
        (dict(heads=0), "model.heads is 0: give 1 or more"),
        (dict(decoder=0), "model.decoder is 0: give 1 or more"),
        (dict(downsampled=-2), "model.downsampled is -2: give 0 or more"),
        (dict(contrast_window=-3), "model.contrast_window is -3"),
        (dict(window=-1), r"the attention window must be odd, or 0 \(global\), not -1"),
        (dict(skips=(2, 2)), r"model.skips is \(2, 2\): give levels from 0 to 3, each once"),
        (dict(skips=(2, -1)), r"model.skips is \(2, -1\)"),
        (dict(skips=(4, 2)), r"model.skips is \(4, 2\)"),
        (dict(window=0, tokens=1), "model.tokens is 1: give 2 or more"),
        (dict(encoder=":Encoder"), "model.encoder: ':Encoder' cannot be used: Empty module name"),
        (dict(encoder="pooled", levels=6, downsampled=6), "level 4 of the encoder cannot halve .1, 1, 1. features"),
        (dict(encoder="strode"), "model.encoder: 'strode' is not known; known are strided, pooled"),
        (dict(encoder="no_such_module:Encoder"), "model.encoder: 'no_such_module:Encoder' cannot be used: No module"),
        (dict(encoder="gridreg_jax.models.layers:Encodr"), "cannot be used: .*has no attribute 'Encodr'"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        shapes_of_params(**TINY | fields)


def test_unknown_names_get_the_nearest_known_one():
    with pytest.raises(InputError, match="model: 'gridreq' is not known; .*did you mean 'gridreg'"):
        build("gridreq")
    with pytest.raises(InputError, match="field of the model 'gridreg': 'widht' is not known; .*did you mean 'width'"):
        build("gridreg", widht=8)
    with pytest.raises(InputError, match="'zzz' is not known; known are encoder, levels, .*interpolator"):
        build("gridreg", zzz=8)


@pytest.mark.parametrize("method", ["trilinear", "bspline"])
def test_position_codes_tell_control_points_apart(method):
    codes = position_encoding([control_positions(method, 15)] * 3)
    assert codes.shape == (15, 15, 15, 27) and codes.dtype == np.float32
    along = codes[:, 0, 0]
    distance = np.linalg.norm(along[:, None] - along[None], axis=-1) + 9 * np.eye(15)
    assert distance.min() > 0.1
    assert len(np.unique(codes.reshape(-1, 27), axis=0)) == 15**3


@pytest.mark.parametrize("method", ["trilinear", "bspline"])
@pytest.mark.parametrize("grid_size", range(4, 16))
def test_no_frequency_aliases_on_any_grid(method, grid_size):
    step = np.diff(control_positions(method, grid_size)).max()
    assert FREQUENCIES.max() * step <= np.pi + 1e-9


def test_position_codes_are_sines_and_cosines_of_the_positions():
    x, y, z = (np.array(p) for p in ([0.0, 0.3], [0.2, 0.5, 1.0], [0.7]))
    codes = position_encoding([x, y, z])
    for axis, (size, position) in enumerate(zip((2, 3, 1), (x[1], y[2], z[0]), strict=True)):
        found = codes[1, 2, 0].reshape(3, 9)[axis]
        phases = position * FREQUENCIES
        np.testing.assert_allclose(found, [2 * position - 1, *np.sin(phases), *np.cos(phases)], atol=1e-6)
        assert codes.shape[axis] == size


LATTICES = {"coarse": np.linspace(0, 8, 17), "fine": np.linspace(0, 8, 5), "cropped": np.arange(2.0, 7)}


@pytest.mark.parametrize("points", LATTICES.values(), ids=LATTICES)
def test_resampling_reproduces_constants_and_inner_ramps(points):
    ramp = jnp.indices((9, 9, 9)).astype(jnp.float32).transpose(1, 2, 3, 0)[None]
    found = resample_features(ramp, [points] * 3)
    inner = slice(1, -1)
    expected = np.stack(np.meshgrid(points, points, points, indexing="ij"), -1)
    np.testing.assert_allclose(found[0, inner, inner, inner], expected[inner, inner, inner], atol=1e-4)
    constant = resample_features(jnp.full((1, 9, 9, 9, 2), 3.0), [points] * 3)
    np.testing.assert_allclose(constant, np.full((1, *[len(points)] * 3, 2), 3), rtol=1e-6)


def test_resampling_averages_fine_features_over_the_spacing_of_the_points():
    # A pattern that alternates from feature to feature is gone; picking the nearest feature would keep it.
    alternating = jnp.broadcast_to((-1.0) ** jnp.arange(9).reshape(1, 9, 1, 1, 1), (1, 9, 9, 9, 1))
    found = resample_features(alternating, [np.linspace(0, 8, 5)] * 3)
    np.testing.assert_allclose(found[:, 1:-1], 0, atol=1e-6)


def test_resampling_beyond_the_features_takes_the_nearest():
    ramp = jnp.arange(3.0).reshape(1, 3, 1, 1, 1)
    found = resample_features(ramp, [np.array([-1.0, 1.0, 3.0]), np.array([0.0, 0.5]), np.zeros(1)])
    np.testing.assert_allclose(found[0, :, :, 0, 0], [[0, 0], [1, 1], [2, 2]], atol=1e-6)


def test_a_second_iteration_adds_what_the_network_finds_on_the_warped_image():
    fixed, moving = images()
    params = random_params(iterations=1, **TINY)
    options = dict(grid_size=(4, 5, 4))
    once, twice = (
        jax.jit(functools.partial(build("gridreg", iterations=iterations, **TINY).apply, **options))
        for iterations in (1, 2)
    )
    first = once(params, fixed, moving)
    second = once(params, fixed, warp(moving, first.displacement))
    both = twice(params, fixed, moving)
    np.testing.assert_allclose(both.control_grid, first.control_grid + second.control_grid, atol=1e-4)


@pytest.mark.parametrize("field", [{"contrast_window": 4}, {"iterations": 0}, {"segmenter": -1}])
def test_impossible_fields_are_named(field):
    with pytest.raises(InputError, match=f"model.{next(iter(field))} is"):
        shapes_of_params(**field, **TINY)


def test_a_model_is_described_by_all_its_fields():
    model = build("gridreg", levels=6, interpolator="bspline")
    described = describe(model)
    assert described["levels"] == 6 and "decoder" in described
    assert build(**described) == model


def test_in_training_any_iteration_is_the_last_and_those_before_it_are_given():
    fixed, moving = images()
    params = random_params(**TINY)
    options = dict(grid_size=(4, 5, 4))
    once, twice = (build("gridreg", iterations=iterations, **TINY) for iterations in (1, 2))

    def with_gradient(function):
        def squares(params, *key):
            grid = function(params, *key).control_grid
            return (grid**2).sum(), grid

        return jax.jit(jax.grad(squares, has_aux=True))

    def train(params, key):
        return twice.apply(params, fixed, moving, **options, train=True, rngs={"iterations": key})

    def first(params):
        return once.apply(params, fixed, moving, **options)

    def second(params):
        given = jax.lax.stop_gradient(first(params))
        more = once.apply(params, fixed, warp(moving, given.displacement), **options)
        return dataclasses.replace(more, control_grid=given.control_grid + more.control_grid)

    trained = with_gradient(train)
    found = [trained(params, jax.random.key(seed)) for seed in range(12)]
    for candidate in (first, second):
        gradient, grid = with_gradient(candidate)(params)
        drawn = [other for other, drawn_grid in found if np.abs(drawn_grid - grid).max() < 1e-4]
        assert 0 < len(drawn) < len(found)  # the other number of iterations gives another grid
        for a, b in zip(*map(jax.tree.leaves, (drawn[0], gradient)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max() + 1e-4)


def test_a_bounded_head_stays_within_its_bound():
    params = jax.tree.map(lambda leaf: 20 * leaf, random_params(**TINY))
    half = (np.array(SHAPE) - 1) / 2
    for bound in (0.1, 1.0):
        model = build("gridreg", **TINY, bound=bound)
        grid = jax.jit(functools.partial(model.apply, grid_size=(5, 4, 6)))(params, *images()).control_grid
        assert np.all(np.abs(grid) <= bound * half + 1e-4)
        assert np.abs(grid).max() > 0.5 * bound * half.min()


def test_bfloat16_is_close_and_leaves_float32_behind():
    params = random_params(**TINY)
    full, half = (
        build("gridreg", **TINY, precision=precision).apply(params, *images(), grid_size=(5, 4, 6)).displacement
        for precision in ("float32", "bfloat16")
    )
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - full).max() < 0.1 * np.abs(full).max()
    with pytest.raises(InputError, match="float32"):
        build("gridreg", **TINY, precision="float16").apply(params, *images(), grid_size=(5, 4, 6))


def test_the_bayesian_head_leaves_the_mean_alone_and_its_variance_reaches_the_voxels_exactly():
    fields = TINY | dict(interpolator="bspline", bayesian=True)
    params = random_params(**fields)
    bayesian = build("gridreg", **fields).apply(params, *images(), grid_size=(5, 4, 6))
    plain = build("gridreg", **fields | dict(bayesian=False))
    without = {name: leaf for name, leaf in params["params"].items() if name != "log_variance"}
    mean = plain.apply({"params": without}, *images(), grid_size=(5, 4, 6))
    np.testing.assert_allclose(bayesian.control_grid, mean.control_grid, atol=1e-6)
    assert mean.variance is None and bayesian.log_variance.std() > 0.1
    weights = [axis_weights("bspline", g, size) for g, size in zip((5, 4, 6), SHAPE, strict=True)]
    expected = np.einsum("xa,yb,zc,nabcd->nxyzd", *(w**2 for w in weights), np.exp(bayesian.log_variance))
    np.testing.assert_allclose(bayesian.variance, expected, rtol=1e-4)


def test_a_predicted_variance_starts_alike_everywhere_and_follows_the_features():
    fields = TINY | dict(interpolator="bspline", iterations=2)
    bayesian = build("gridreg", **fields, bayesian=True, variance="predicted")
    start, params = bayesian.init_with_output(jax.random.key(0), *images(), grid_size=(5, 4, 6))
    np.testing.assert_array_equal(start.log_variance, 0)
    head = params["params"]["variance_head"]
    head["kernel"] = head["kernel"].at[0].set(jnp.arange(3.0))
    found = bayesian.apply(params, *images(), grid_size=(5, 4, 6))
    plain = build("gridreg", **fields).apply(params, *images(), grid_size=(5, 4, 6))
    np.testing.assert_allclose(found.control_grid, plain.control_grid, atol=1e-6)
    # One of the features: not at all, once and twice.
    assert not found.log_variance[..., 0].any() and found.log_variance[..., 1].std() > 1e-3
    np.testing.assert_allclose(found.log_variance[..., 2], 2 * found.log_variance[..., 1], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="model.variance: 'guessed' is not known; known are observed, predicted"):
        build("gridreg", **TINY, variance="guessed").apply(params, *images(), grid_size=(5, 4, 6))


def test_the_variance_of_the_bayesian_head_starts_at_what_the_images_say():
    """A texture and its shift by (0.3, 0.2, 0.1) voxels: the mean square of the three, wherever one looks."""
    shape, shift = (40, 40, 40), (0.3, 0.2, 0.1)
    texture = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=shape), 1.5)
    texture = (texture - texture.min()) / np.ptp(texture)
    pair = [
        jnp.asarray(image[None, ..., None], jnp.float32)
        for image in (texture, ndimage.shift(texture, shift, mode="nearest"))
    ]
    model = build("gridreg", **TINY | dict(bayesian=True))
    predict = jax.jit(lambda *pair: model.init_with_output(jax.random.key(0), *pair, grid_size=(5, 5, 5))[0])
    start = predict(*pair)
    inner = np.exp(start.log_variance[:, 1:-1, 1:-1, 1:-1])
    assert np.median(inner) == pytest.approx(np.mean(np.square(shift)), rel=0.3)
    same = predict(pair[0], pair[0])
    assert np.exp(same.log_variance).max() < 0.001


class Odd(nn.Module):
    """What an encoder should not give: `kind` of it."""

    levels: int
    width: int
    downsampled: int
    kind: str = ""

    @nn.compact
    def __call__(self, x):
        features = x[:, ::2, ::2, ::2]
        maps = [FeatureMap(features, 2)] * self.levels
        return {"short": maps[1:], "arrays": [features] * self.levels, "flat": [FeatureMap(x[:, 0], 1)] * self.levels}[
            self.kind
        ]


@pytest.mark.parametrize("kind", ["short", "arrays", "flat"])
def test_what_is_no_pyramid_of_features_is_refused(kind, monkeypatch):
    monkeypatch.setitem(layers.ENCODERS, "odd", functools.partial(Odd, kind=kind))
    with pytest.raises(InputError, match=r"model.encoder: 'odd' must give 4 of `layers.FeatureMap`, fine to coarse"):
        shapes_of_params(**TINY, encoder="odd")


def test_the_encoder_of_the_documentation_can_be_named(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    code = [line for line in text.splitlines() if line.startswith("    ") or not line.strip()]
    (tmp_path / "blur_encoder.py").write_text(textwrap.dedent("\n".join(code)))
    monkeypatch.syspath_prepend(tmp_path)
    fields = TINY | dict(encoder="blur_encoder:Blur")
    assert shapes_of_params(**fields)["params"]["encoder"]["Dense_0"]["kernel"].shape == (2, 4)
    found = build("gridreg", **fields).init_with_output(jax.random.key(0), *images(), grid_size=(4, 5, 4))[0]
    assert found.control_grid.shape == (1, 4, 5, 4, 3)
