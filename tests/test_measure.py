import jax.numpy as jnp
import pytest

from gridreg_jax.losses import mse
from gridreg_jax.measure import candidates, coarsest_sufficient


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ({5: 0.40, 8: 0.10, 10: 0.09, 15: 0.08}, 8),  # 0.90 of a gain of 0.92
        ({5: 0.12, 8: 0.10, 10: 0.09, 15: 0.08}, 5),
        ({5: 0.50, 8: 0.30, 10: 0.20, 15: 0.08}, 15),
        ({5: 0.10, 8: 0.50, 10: 0.60, 15: 0.70}, 5),
        ({5: 1.30, 8: 1.10, 10: 1.20, 15: 1.40}, 8),  # all make it worse: the least
    ],
)
def test_the_coarsest_grid_that_keeps_the_gain_is_chosen(errors, expected):
    image = jnp.zeros((1, 4, 4, 4, 1))
    batch = {"fixed": image, "moving": image + 1}  # a mean squared error of 1

    def predict(params, batch, grid_size):
        return {"warped": image + errors[grid_size[0]] ** 0.5}

    assert coarsest_sufficient(predict, None, (15, 5, 10, 8), mse)(batch) == (expected,) * 3


def test_a_size_that_is_drawn_more_often_is_one_candidate():
    assert candidates((15, 5, 15, 8)) == [(5, 5, 5), (8, 8, 8), (15, 15, 15)]
    assert candidates(()) == [None]
