"""Optimisers: the schedules of their learning rates."""

import jax.numpy as jnp
import numpy as np
import pytest

from gridreg_jax.errors import InputError
from gridreg_jax.training.optimizer import build_optimizer


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


def test_an_unknown_optimizer_is_named():
    with pytest.raises(InputError, match="optimizer.name: 'adm' is not known; known are adam, adamax, amsgrad, sgd"):
        build_optimizer(name="adm", steps=1)
