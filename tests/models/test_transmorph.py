"""TransMorph: sizes, attention within windows, the identity it starts from, and its other outputs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from scipy.interpolate import BSpline

from configs.models import MODELS
from gridreg_jax.errors import InputError
from gridreg_jax.models import build, transmorph

ODD = (9, 7, 10)
TINY = dict(embed=4, depths=(1, 2), heads=(1, 2), window=(2, 1, 3))


def images(shape=ODD, cases=1):
    return jnp.asarray(np.random.default_rng(0).uniform(size=(2, cases, *shape, 1)), jnp.float32)


def init(model, shape=ODD):
    image = jax.ShapeDtypeStruct((1, *shape, 1), jnp.float32)
    return model.lazy_init(jax.random.key(0), image, image)


def random_params(model, seed=0):
    """Parameters away from those at the start, head included."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(lambda: init(model))
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transmorph", 46_771_251),
        ("transmorph_tiny", 244_527),
        ("transmorph_small", 11_757_195),
        ("transmorph_large", 108_343_907),
        ("transmorph_noskip", 41_476_659),
        ("transmorph_bspline", 46_806_307),
        ("transmorph_diff", 46_557_414),
    ],
)
def test_the_parameters_are_as_many_as_the_authors(name, expected):
    params = jax.eval_shape(lambda: init(build(**MODELS[name]["fields"])))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


@pytest.mark.parametrize("output", ["displacement", "diffeomorphic"])
def test_every_parameter_has_a_gradient_for_images_of_any_size(output):
    model = build("transmorph", **TINY, output=output)
    params, streams = random_params(model), {name: jax.random.key(1) for name in model.example_streams}

    def total(params, fixed, moving):
        prediction = model.apply(params, fixed, moving, train=True, rngs=streams)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(prediction)), prediction

    slopes, prediction = jax.jit(jax.grad(total, has_aux=True))(params, *images(cases=3))
    assert prediction.displacement.shape == (3, *ODD, 3)
    for path, leaf in jax.tree_util.tree_leaves_with_path(slopes):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


@pytest.mark.parametrize(
    "fields", [dict(), dict(transformer_skips=False, convolution_skips=False), dict(output="diffeomorphic")]
)
def test_starts_next_to_the_identity(fields):
    model = build("transmorph", **TINY, **fields)
    start = jax.jit(lambda *pair: model.init_with_output(jax.random.key(0), *pair)[0].displacement)
    assert 0 < np.abs(start(*images())).max() < 1e-2


def attention_by_hand(x, params, heads, window, shift):
    """Cell after cell: which others share its window (cut at the border, nothing wraps), and what they say."""
    shape = [-(-n // w) * w for n, w in zip(x.shape, window, strict=False)]
    padded = np.zeros((*shape, x.shape[-1]))
    padded[tuple(map(slice, x.shape[:3]))] = x
    cells = list(itertools.product(*map(range, shape)))
    place = {cell: tuple((c - s) // w for c, s, w in zip(cell, shift, window, strict=True)) for cell in cells}
    features = {cell: np.split(padded[cell] @ params["query_key_value"]["kernel"], 3) for cell in cells}
    result = np.zeros_like(padded)
    for cell in cells:
        near = [other for other in cells if place[other] == place[cell]]
        merged = []
        for head in range(heads):
            query, *_ = np.split(features[cell][0], heads)[head : head + 1]
            logits = []
            for other in near:
                key = np.split(features[other][1], heads)[head]
                apart = [c - o + w - 1 for c, o, w in zip(cell, other, window, strict=True)]
                row = np.ravel_multi_index(apart, [2 * w - 1 for w in window])
                logits.append(query @ key / np.sqrt(len(query)) + params["bias"][row, head])
            weights = np.exp(logits) / np.exp(logits).sum()
            merged.append(weights @ [np.split(features[other][2], heads)[head] for other in near])
        result[cell] = np.concatenate(merged) @ params["out"]["kernel"] + params["out"]["bias"]
    return result[tuple(map(slice, x.shape[:3]))]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window"), [((5, 4, 6), (2, 3, 3)), ((3, 2, 4), (3, 2, 4))])
def test_attention_is_that_of_cells_in_one_window(grid, window, shifted):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *grid, 4))
    attention = transmorph.WindowAttention(2, window, shifted)
    shapes = jax.eval_shape(attention.init, jax.random.key(0), jnp.float32(x))["params"]
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
    found = attention.apply({"params": jax.tree.map(jnp.float32, params)}, jnp.float32(x))
    shift = [w // 2 if shifted else 0 for w in window]
    expected = np.stack([attention_by_hand(one, params, 2, window, shift) for one in x])
    np.testing.assert_allclose(found, expected, atol=2e-5)


def block_by_hand(x, params, heads, window, shift):
    """Attention and a perceptron, each after a layer norm and added to what it was given."""

    def norm(x, params):
        variance = x.var(-1, keepdims=True)
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-5) * params["scale"] + params["bias"]

    x = x + attention_by_hand(norm(x, params["attention_norm"]), params["attention"], heads, window, shift)
    hidden = norm(x, params["hidden_norm"]) @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    hidden *= (1 + special.erf(hidden / np.sqrt(2))) / 2
    return x + hidden @ params["out"]["kernel"] + params["out"]["bias"]


def test_every_second_block_has_shifted_windows():
    heads, window = 2, (2, 1, 3)
    model = build("transmorph", embed=4, depths=(3,), heads=(heads,), window=window)
    params, pair = jax.tree.map(lambda leaf: 3 * leaf, random_params(model)), images((12, 8, 16))
    names = ["patch_norm", *(f"level0_block{number}" for number in range(3))]

    def apply(params, *pair):
        return model.apply(params, *pair, capture_intermediates=lambda module, _: module.name in names)[1]

    found = jax.jit(apply)(params, *pair)["intermediates"]
    given, *outputs = (np.float64(found[name]["__call__"][0][0]) for name in names)
    for name, output, shift in zip(names[1:], outputs, [(0, 0, 0), (1, 0, 1), (0, 0, 0)], strict=True):
        of_block = jax.tree.map(np.float64, params["params"][name])
        expected = block_by_hand(given, of_block, heads, window, shift)
        np.testing.assert_allclose(output, expected, atol=1e-4, err_msg=name)
        given = output


def test_features_are_doubled_linearly():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 5, 2)), jnp.float32)
    expected = jax.image.resize(x, (2, 6, 8, 10, 2), "trilinear", antialias=False)
    np.testing.assert_allclose(transmorph._upsampled(x), expected, atol=1e-5)


@pytest.mark.parametrize(("size", "spacing"), [(160, 3), (13, 3), (10, 4)])
def test_spline_weights_are_those_of_scipy(size, spacing):
    controls = -(-(size - 1) // spacing) + 3
    knots = spacing * (np.arange(controls + 4) - 3.0)
    expected = BSpline.design_matrix(np.arange(size, dtype=float), knots, 3).toarray()
    np.testing.assert_allclose(transmorph._spline_weights(controls, size, spacing), expected, atol=1e-12)


def with_constant_flow(model, flow):
    shapes = jax.eval_shape(lambda: init(model))["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    params["flow"]["bias"] = flow
    return {"params": params}


@pytest.mark.parametrize(
    ("fields", "voxels"),
    [
        (dict(), 1.0),
        (dict(output="bspline"), 1.0),
        # The velocity is in voxels of half the resolution; the authors' code forgets to divide it before squaring.
        (dict(output="diffeomorphic"), 2.0),
        (dict(output="diffeomorphic", scaled=False), 2.0 * 2**7),
    ],
)
def test_a_constant_flow_moves_everything_alike(fields, voxels):
    model, flow = build("transmorph", **TINY, **fields), np.array([1.5, -0.5, 3.0], np.float32)
    prediction = jax.jit(model.apply)(with_constant_flow(model, flow), *images())
    np.testing.assert_allclose(prediction.displacement, np.broadcast_to(voxels * flow, (1, *ODD, 3)), rtol=1e-4)
    if fields:
        np.testing.assert_allclose(prediction.velocity, np.broadcast_to(flow, prediction.velocity.shape), rtol=1e-4)


def test_training_leaves_branches_out_and_prediction_none():
    model = build("transmorph", **TINY, drop_path=0.9)
    params = random_params(model)
    predict = jax.jit(
        lambda key, train, *pair: model.apply(params, *pair, train=train, rngs={"dropout": key}).displacement,
        static_argnums=1,
    )
    first, *others = [predict(jax.random.key(seed), True, *images()) for seed in range(5)]
    assert max(np.abs(first - other).max() for other in others) > 1e-2
    np.testing.assert_array_equal(*(predict(jax.random.key(seed), False, *images()) for seed in range(2)))


def test_predictions_with_dropout_are_averaged_and_vary():
    options = dict(TINY, drop_path=0.0, dropout=0.15)
    params = random_params(build("transmorph", **options))
    one = build("transmorph", **options)
    keys = jax.random.split(jax.random.key(0), 4)
    predict = jax.jit(lambda key, *pair: one.apply(params, *pair, rngs={"dropout": key}).displacement)
    passes = np.stack([predict(key, *images()) for key in keys])
    averaged = jax.jit(build("transmorph", **options, passes=4).apply)(params, *images())
    np.testing.assert_allclose(averaged.displacement, passes.mean(0), atol=1e-4)
    np.testing.assert_allclose(averaged.variance, passes.var(0), rtol=1e-2, atol=1e-4)
    assert averaged.variance.mean() > 1e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(output="affine"), "model.output: 'affine' is not known; known are displacement, bspline, diffeomorphic"),
        (dict(heads=(1,)), "model.depths has 2 levels and model.heads 1"),
        (dict(embed=5), "model.embed is 5: give an even number"),
        (dict(heads=(1, 3)), "model.heads: 8 features cannot be shared by 3 heads"),
        (dict(passes=4), "model.passes needs model.dropout"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        init(build("transmorph", **TINY | fields))
