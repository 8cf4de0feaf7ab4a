"""From features to a control grid: both decoders against their definition, in NumPy and with random parameters."""

import functools
import itertools

import jax
import numpy as np
import pytest
from flax import linen as nn
from scipy import ndimage

from gridreg_jax.models import build, layers
from gridreg_jax.models.layers import FeatureMap, position_encoding

SHAPE, GRID = (5, 7, 5), (3, 4, 3)
CONTROLS = [np.linspace(0, 1, size) for size in GRID]
# Where the features of a level lie: from which voxel on, and how many apart.
LEVELS = ((0, 2), (1, 2), (0, 4))


class Strided(nn.Module):
    """Pairs of intensities in place of an encoder's features."""

    levels: int
    width: int
    downsampled: int

    def __call__(self, x):
        return [FeatureMap(x[:, at::step, at::step, at::step], step, float(at)) for at, step in LEVELS]


@pytest.fixture
def predict(monkeypatch):
    """Random parameters, the features of the levels, and what a model makes of both: its control grid."""
    monkeypatch.setitem(layers.ENCODERS, "none", Strided)
    rng = np.random.default_rng(0)
    pair = rng.normal(size=(2, 1, *SHAPE, 1)).astype(np.float32)

    def run(name, **fields):
        model = build(name, encoder="none", levels=len(LEVELS), skips=(1, 0), **fields)
        shapes = jax.eval_shape(functools.partial(model.init, grid_size=GRID), jax.random.key(0), *pair)["params"]
        params = jax.tree.map(lambda leaf: rng.normal(scale=0.5, size=leaf.shape).astype(np.float32), shapes)
        found = jax.jit(functools.partial(model.apply, grid_size=GRID))({"params": params}, *pair).control_grid[0]
        features = [level.features[0] for level in Strided(0, 0, 0)(np.concatenate(pair, axis=-1))]
        return jax.tree.map(np.float64, params), features, found

    return run


def dense(x, params):
    return x @ params["kernel"] + params.get("bias", 0)


def layer_norm(x, params):
    variance = x.var(-1, keepdims=True)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-6) * params["scale"] + params["bias"]


def linear(x, places):
    """Between the points of an array; constant beyond them."""
    grid = np.meshgrid(*places, indexing="ij")
    channels = np.moveaxis(x, -1, 0)
    return np.stack([ndimage.map_coordinates(one, grid, order=1, mode="nearest") for one in channels], axis=-1)


def at_points(features, level, points):
    """Features of a level at points in [0, 1], from corner to corner of the images."""
    at, step = LEVELS[level]
    return linear(features, [(p * (size - 1) - at) / step for p, size in zip(points, SHAPE, strict=True)])


def cross_attention(queries, tokens, params, heads, window):
    """Control point after control point: which tokens it sees, and what they say."""
    query = dense(queries, params["query"])
    key, value = (dense(tokens, params[name]) for name in ("key", "value"))
    merged = np.zeros_like(query)
    for point, head in itertools.product(np.ndindex(query.shape[:3]), range(heads)):
        part = np.split(np.arange(query.shape[-1]), heads)[head]
        logits, near = [], []
        for other in np.ndindex(key.shape[:3]):
            place = np.subtract(other, point) + window // 2
            if window and (place.min() < 0 or place.max() >= window):
                continue
            bias = params["bias"][np.ravel_multi_index(place, (window,) * 3), head] if window else 0
            logits.append(query[point][part] @ key[other][part] / np.sqrt(len(part)) + bias)
            near.append(value[other][part])
        merged[point][part] = np.exp(logits) / np.exp(logits).sum() @ np.array(near)
    return dense(merged, params["out"])


@pytest.mark.parametrize("window", [3, 0])
def test_attention_and_a_perceptron_add_to_the_state_level_after_level(predict, window):
    heads = 2
    params, features, found = predict("gridreg", projection=3, decoder=4, heads=heads, window=window, tokens=4)
    points = CONTROLS if window else [np.linspace(0, 1, 4)] * 3
    places = [p * (size - 1) for p, size in zip(points, GRID, strict=True)]
    encoding, around = map(position_encoding, (CONTROLS, points))
    state = dense(encoding, params["start"])
    for number, level in enumerate((2, 1, 0)):
        of_level = jax.tree.map(lambda leaf, number=number: leaf[number], params["decoder"])
        straight, left, right = np.split(dense(features[level], params[f"projection{level}"]), 3, axis=-1)
        projected = layer_norm(at_points(straight + left * right, level, points), of_level["LayerNorm_1"])
        normed = layer_norm(state, of_level["LayerNorm_0"])
        queries = np.concatenate([normed, encoding], axis=-1)
        tokens = np.concatenate([projected, linear(normed, places), around], axis=-1)
        state = state + cross_attention(queries, tokens, of_level["CrossAttention_0"], heads, window)
        x = dense(layer_norm(state, of_level["LayerNorm_2"]), of_level["Dense_0"])
        x = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        state = state + dense(x, of_level["Dense_1"])
    halves = dense(layer_norm(state, params["head_norm"]), params["head"])
    np.testing.assert_allclose(found, halves * (np.array(SHAPE) - 1) / 2, atol=1e-4)


def test_the_pointwise_decoder_is_layers_without_neighbours(predict):
    params, features, found = predict("gridreg_pointwise", projection=5)
    coordinates = np.stack(np.meshgrid(*(2 * axis - 1 for axis in CONTROLS), indexing="ij"), axis=-1)
    x = np.concatenate([at_points(features[2], 2, CONTROLS), coordinates], axis=-1)
    for level in (1, 0):
        state = dense(x, params[f"step{level}"])
        projected = dense(at_points(features[level], level, CONTROLS), params[f"projection{level}"])
        if level == 0:
            projected += dense(at_points(features[level], level, CONTROLS), params["projection_again"])
        x = np.concatenate([np.where(state > 0, state, 0.1 * state), projected], axis=-1)
    halves = np.tanh(dense(x, params["head"]))
    np.testing.assert_allclose(found, halves * (np.array(SHAPE) - 1) / 2, atol=1e-4)
