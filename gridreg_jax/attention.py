"""Local attention on a grid: every cell attends to the window of cells around it.

The keys and values of a window are never gathered: the window's places are visited one after the other, forwards and
backwards, so that memory grows with the grid and not with the window's volume times the features.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def window_attention(
    query: Float[Array, "N gx gy gz D"],
    key: Float[Array, "N gx gy gz D"],
    value: Float[Array, "N gx gy gz D"],
    bias: Float[Array, "W H"],
    window: int,
) -> Float[Array, "N gx gy gz D"]:
    """Softmax attention of every cell to the `window`^3 cells around it; cells outside the grid do not count.

    What comes back has the unit of `value`. Source: Yan et al., Medical Physics 2026, section 3.1 (local attention);
    Ramachandran et al., NeurIPS 2019; a bias by relative place, Liu et al., Swin transformer, ICCV 2021.

    Args:
      query: already scaled by 1 / sqrt(D / H). The features of a head lie together; they stay one axis, because a
        short last axis makes these sums several times slower on the CPU.
      bias: added to the logits, by the neighbour's place in the window (W = window^3, C order) and head (H).
      window: odd.
    """
    return _forward(query, key, value, bias, window)[0]


def _forward(query, key, value, bias, window):
    heads = bias.shape[1]
    # Written out: XLA makes one loop of it, where it would leave sums to a library, one after the other (CPU, twice as
    # fast; in the gradient, which uses the products again, it is the other way round).
    logits = jnp.stack([_sum_heads(query * near, heads, written_out=True) for near in _neighbours(key, window)])
    logits = logits + bias[:, None, None, None, None]
    weights = jax.nn.softmax(jnp.where(_inside(query.shape[1:4], window), logits, -jnp.inf), axis=0)
    return _weighted_sum(weights, _neighbours(value, window)), (query, key, value, weights)


def _backward(window, residuals, gradient):
    query, key, value, weights = residuals
    heads = weights.shape[-1]
    d_weights = jnp.stack([_sum_heads(gradient * near, heads) for near in _neighbours(value, window)])
    # As a product rather than a sum: XLA would compute the sum anew for every neighbour that uses it (CPU, 50 times
    # slower).
    mean = jnp.einsum("wnxyzh,wnxyzh->nxyzh", weights, d_weights)
    d_logits = weights * (d_weights - mean)
    d_query = _weighted_sum(d_logits, _neighbours(key, window))
    # What a cell gave to its neighbours comes back from them: the same window, seen from the other side.
    d_key = _weighted_sum(_from_neighbours(d_logits, window), _neighbours(query, window)[::-1])
    d_value = _weighted_sum(_from_neighbours(weights, window), _neighbours(gradient, window)[::-1])
    return d_query, d_key, d_value, d_logits.sum((1, 2, 3, 4))


window_attention.defvjp(_forward, _backward)


def _inside(grid: tuple[int, int, int], window: int) -> np.ndarray:
    """Which neighbours exist: `[W, 1, gx, gy, gz, 1]` bool."""
    axes = []
    for size in grid:
        place = np.arange(window)[:, None] - window // 2 + np.arange(size)
        axes.append((place >= 0) & (place < size))
    return np.einsum("ax,by,cz->abcxyz", *axes).reshape(-1, 1, *grid, 1)


def _sum_heads(x: Float[Array, "N gx gy gz D"], heads: int, *, written_out=False) -> Float[Array, "N gx gy gz H"]:
    x = x.reshape(*x.shape[:-1], heads, -1)
    return sum(x[..., place] for place in range(x.shape[-1])) if written_out else x.sum(-1)


def _weighted_sum(weights, values) -> Float[Array, "N gx gy gz D"]:
    """Sum over the window of values `[..., D]` times weights of their head `[..., H]`."""
    features = values[0].shape[-1]
    return sum(
        jnp.repeat(weight, features // weight.shape[-1], axis=-1) * value
        for weight, value in zip(weights, values, strict=True)
    )


def _neighbours(x: Float[Array, "N gx gy gz D"], window: int) -> list[Array]:
    """For every place in the window, what lies there as seen from each cell; zeros outside the grid."""
    reach, grid = window // 2, x.shape[1:4]
    padded = jnp.pad(x, [(0, 0)] + [(reach, reach)] * 3 + [(0, 0)])
    return [
        padded[:, i : i + grid[0], j : j + grid[1], k : k + grid[2]]
        for i in range(window)
        for j in range(window)
        for k in range(window)
    ]


def _from_neighbours(weights: Float[Array, "W N gx gy gz H"], window: int) -> list[Array]:
    """For every place in the window, the weight that the cell on the opposite side gave to this one."""
    opposite = range(window**3 - 1, -1, -1)
    return [_neighbours(weight, window)[place] for weight, place in zip(weights, opposite, strict=True)]
