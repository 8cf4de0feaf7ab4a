"""Window attention, against a loop over cells and against plain attention with a mask."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gridreg_jax import attention

window_attention = jax.jit(attention.window_attention, static_argnums=4)

GRID = (4, 5, 3)
HEADS, FEATURES = 2, 6


def random_arguments(window, grid=GRID, heads=HEADS):
    rng = np.random.default_rng(0)
    query, key, value = jnp.asarray(rng.normal(size=(3, 2, *grid, FEATURES)), jnp.float32)
    return query, key, value, jnp.asarray(rng.normal(size=(window**3, heads)), jnp.float32)


def loop_over_cells(query, key, value, bias, window):
    """The definition, cell by cell and head by head, in double precision."""
    query, key, value, bias = map(np.float64, (query, key, value, bias))
    heads, reach = bias.shape[1], window // 2
    grid, width = query.shape[1:4], query.shape[-1] // heads
    out = np.zeros(query.shape)
    offsets = list(itertools.product(range(-reach, reach + 1), repeat=3))
    for case, head in itertools.product(range(len(query)), range(heads)):
        part = slice(head * width, (head + 1) * width)
        for cell in np.ndindex(*grid):
            near, logits = [], []
            for place, offset in enumerate(offsets):
                other = tuple(np.add(cell, offset))
                if all(0 <= o < n for o, n in zip(other, grid, strict=True)):
                    near.append(value[case][other][part])
                    logits.append(query[case][cell][part] @ key[case][other][part] + bias[place, head])
            weights = np.exp(logits) / np.exp(logits).sum()
            out[case][cell][part] = weights @ np.array(near)
    return out


def masked_attention(query, key, value, bias, window):
    """The same as attention of all cells to all cells, with those outside the window masked."""
    grid, heads = query.shape[1:4], bias.shape[1]
    cells = np.indices(grid).reshape(3, -1).T
    offset = cells[None] - cells[:, None] + window // 2
    inside = ((offset >= 0) & (offset < window)).all(-1)
    place = np.where(inside, offset @ [window**2, window, 1], 0)
    query, key, value = (x.reshape(len(x), len(cells), heads, -1) for x in (query, key, value))
    logits = jnp.einsum("nqhd,nkhd->nqkh", query, key) + bias[place]
    weights = jax.nn.softmax(jnp.where(inside[..., None], logits, -jnp.inf), axis=2)
    return jnp.einsum("nqkh,nkhd->nqhd", weights, value).reshape(len(value), *grid, -1)


@pytest.mark.parametrize(("window", "heads"), [(1, 2), (3, 1), (3, 3), (5, 2)])
def test_agrees_with_a_loop_over_cells(window, heads):
    arguments = random_arguments(window, heads=heads)
    np.testing.assert_allclose(window_attention(*arguments, window), loop_over_cells(*arguments, window), atol=1e-5)


@pytest.mark.parametrize("window", [1, 3])
def test_gradients_are_those_of_masked_attention(window):
    arguments = random_arguments(window)
    weights = np.random.default_rng(1).normal(size=arguments[0].shape).astype(np.float32)

    def gradients(function):
        return jax.jit(jax.grad(lambda *both: jnp.sum(jnp.sin(function(*both, window)) * weights), (0, 1, 2, 3)))

    found, expected = gradients(window_attention)(*arguments), gradients(masked_attention)(*arguments)
    for name, one, other in zip(("query", "key", "value", "bias"), found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_translation_equivariant_away_from_the_border(axis):
    *features, bias = random_arguments(3, grid=(6, 6, 6))
    still = window_attention(*features, bias, 3)
    moved = window_attention(*(jnp.roll(x, 1, axis) for x in features), bias, 3)
    inner = (slice(None), *[slice(2, -2)] * 3)
    np.testing.assert_allclose(moved[inner], np.roll(still, 1, axis)[inner], atol=1e-5)
    # At the border it is not: neighbours that are missing there exist elsewhere.
    assert np.abs(moved - np.roll(still, 1, axis)).max() > 0.1


def test_cells_outside_the_window_have_no_influence():
    query, key, value, bias = random_arguments(3, grid=(6, 3, 3))
    far = [jnp.where(jnp.arange(6).reshape(1, -1, 1, 1, 1) > 3, 99.0, x) for x in (key, value)]
    near, changed = window_attention(query, key, value, bias, 3), window_attention(query, *far, bias, 3)
    np.testing.assert_array_equal(near[:, :3], changed[:, :3])
    assert np.abs(near[:, 3] - changed[:, 3]).max() > 1
