"""Optimisers: the schedules of their learning rates, and what they do to matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from gridreg_jax.errors import InputError
from gridreg_jax.models import build
from gridreg_jax.training.optimizer import _matrices, build_optimizer


def rates(steps, **options):
    """The learning rate of every step: gradient descent on a slope of 1."""
    optimizer = build_optimizer(name="sgd", learning_rate=0.5, steps=steps, **options)
    params, found = jnp.zeros(()), []
    state = optimizer.init(params)
    for _ in range(steps):
        update, state = optimizer.update(jnp.ones(()), state, params)
        found.append(-float(update))
    return np.array(found)


def test_the_learning_rate_is_constant_or_falls_along_a_cosine_or_as_a_power():
    left = 1 - np.arange(100) / 100
    np.testing.assert_allclose(rates(100), 0.5)
    np.testing.assert_allclose(rates(100, decay=True, power=0.9), 0.5 * left**0.9, rtol=1e-5)
    # Two steps of rise.
    cosine = 0.25 * (1 + np.cos(np.pi * np.arange(98) / 98))
    np.testing.assert_allclose(rates(100, decay=True), [0, 0.25, *cosine], rtol=1e-5, atol=1e-7)


def test_muon_moves_all_directions_of_a_kernel_alike_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)

    def steep(rows, columns):
        """A gradient whose singular values fall from 1 to 0.01."""
        left, right = (np.linalg.qr(rng.normal(size=(n, min(rows, columns))))[0] for n in (rows, columns))
        return (left * np.geomspace(1, 0.01, min(rows, columns))) @ right.T

    gradients = {
        "level0": {"kernel": steep(27 * 4, 8).reshape(3, 3, 3, 4, 8), "bias": rng.normal(size=8)},
        "scanned": {"kernel": np.stack([steep(16, 32), 1e-3 * steep(16, 32)])},
        "projection": {"kernel": steep(16, 12)},
        "head": {"kernel": steep(32, 3), "bias": rng.normal(size=3)},
    }
    gradients = {name: {k: jnp.asarray(v, jnp.float32) for k, v in one.items()} for name, one in gradients.items()}

    def update(optimizer):
        found, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
        return found

    orthogonal = update(build_optimizer(name="muon", learning_rate=0.1, steps=1))
    adam = update(optax.nadam(0.1))

    def matrices(tree):
        return tree["level0"]["kernel"].reshape(-1, 8), tree["projection"]["kernel"], *tree["scanned"]["kernel"]

    for found, gradient in zip(matrices(orthogonal), matrices(gradients), strict=True):
        left, _, right = np.linalg.svd(gradient, full_matrices=False)
        # Downhill along every singular direction of the gradient, by about as much along each.
        along = left.T @ found @ right.T / (0.1 * 0.2 * max(found.shape) ** 0.5)
        np.testing.assert_allclose(np.diag(along), -1, atol=0.4)
        np.testing.assert_allclose(along, np.diag(np.diag(along)), atol=1e-3)
    for name, part in (("level0", "bias"), ("head", "kernel"), ("head", "bias")):
        np.testing.assert_allclose(orthogonal[name][part], adam[name][part], rtol=1e-5)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(InputError, match="'adm' is not known; known are adam, adamax, amsgrad, muon, sgd"):
        build_optimizer(name="adm", steps=1)


@pytest.mark.parametrize(
    ("name", "fields", "heads"),
    [
        ("gridreg", dict(segmenter=4, labels=1), ["head", "segmenter/head"]),
        ("gridreg", dict(bayesian=True, variance="predicted"), ["head", "variance_head"]),
        ("voxelmorph", dict(probabilistic=True), ["flow", "log_variance"]),
        ("transmorph", dict(output="diffeomorphic"), ["flow", "log_variance"]),
        ("lightcrcf", dict(fused=True, stages=1), ["unet0/flow"]),
    ],
)
def test_muon_makes_every_kernel_orthogonal_but_the_heads(name, fields, heads):
    image = np.zeros((1, 16, 16, 16, 1), np.float32)
    params = jax.eval_shape(build(name, **fields).init, jax.random.key(0), image, image)["params"]
    numbers = flatten_dict(_matrices(params), sep="/")
    kernels = {path.removesuffix("/kernel"): found for path, found in numbers.items() if path.endswith("/kernel")}
    assert sorted(layer for layer, found in kernels.items() if found is None) == heads
    assert not any(found for path, found in numbers.items() if not path.endswith("/kernel"))
