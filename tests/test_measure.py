"""Which grid a case gets, and what instance optimisation sees of a case."""

import time

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from flax import linen as nn

from gridreg_jax import metrics
from gridreg_jax.data.pipeline import open_dataset
from gridreg_jax.errors import InputError
from gridreg_jax.losses import mse
from gridreg_jax.measure import candidates, coarsest_sufficient, make_predict, measure
from gridreg_jax.models import Prediction


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ({5: 0.40, 8: 0.10, 10: 0.09, 15: 0.08}, 8),  # 0.90 of a gain of 0.92
        ({5: 0.12, 8: 0.10, 10: 0.09, 15: 0.08}, 5),
        ({5: 0.06, 8: 0.04, 10: 0.02, 15: 0.00}, 8),  # 0.94 and 0.96 of a gain of 1: 0.95 are kept
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


SHAPE = (16, 20, 16)


@pytest.fixture
def dataset(subjects_csv):
    data = dict(pairs="", subjects=str(subjects_csv), shape=SHAPE, spacing=(1.0,) * 3, center="image", labels=())
    data |= dict(cohort_subjects=(0, 0, 0), evaluation_pairs=(1, 2), cache_dir="")
    return open_dataset(**data, seed=0, notify=print)


def test_learn2reg_counts_images_as_they_were_and_labels_that_vanish(dataset, subjects_csv):
    noise = np.random.default_rng(0).normal(0, 0.4, (*SHAPE, 3))
    image = np.zeros((1, *SHAPE))

    def row(displacement):
        result = {"displacement": displacement[None], "warped": image[..., None], "warped_labels": image}
        pairs = dataset.pairs["test"][:1]
        return next(iter(measure(lambda *_: result, {}, dataset, pairs, (5, 5, 5), thorough=True)))[0]

    assert np.isfinite(row(noise)["learn2reg_hd95_voxels"])
    assert row(np.full_like(noise, 99))["learn2reg_hd95_voxels"] == np.inf
    stored = nib.load(subjects_csv.parent / f"{row(noise)['moving']}.nii.gz")
    raw = nib.as_closest_canonical(stored).get_fdata()
    assert row(noise)["lumir_ndv_percent"] == metrics.ndv_percent(noise, raw > 0) > 0
    assert ((dataset.arrays(dataset.pairs["test"][:1])["moving"][0, ..., 0] > 0) != (raw > 0)).any()


def test_the_choice_of_a_grid_takes_time_too(dataset):
    image = np.zeros((1, *SHAPE))

    def predict(params, batch, grid_size):
        return {"displacement": np.zeros((*image.shape, 3)), "warped": image[..., None], "warped_labels": image}

    def choose(batch):
        time.sleep(0.2)
        return (5, 5, 5)

    rows = [row for row, _ in measure(predict, {}, dataset, dataset.pairs["test"], choose)]
    assert [row["grid_size"] for row in rows] == ["5x5x5"] * 2
    assert all(row["seconds"] >= 0.2 for row in rows)


def test_a_grid_without_a_similarity_is_not_chosen():
    image = jnp.zeros((1, 4, 4, 4, 1))

    def predict(params, batch, grid_size):
        return {"warped": image + (jnp.nan if grid_size[0] == lost else 0.0)}

    batch = {"fixed": image, "moving": image + 1}
    lost = 5
    assert coarsest_sufficient(predict, None, (5, 8, 10), mse)(batch) == (8, 8, 8)
    with pytest.raises(InputError, match="undefined at every grid size"):
        coarsest_sufficient(predict, None, (5,), mse)(batch)


def test_a_size_that_is_drawn_more_often_is_one_candidate():
    assert candidates((15, 5, 15, 8)) == [(5, 5, 5), (8, 8, 8), (15, 15, 15)]
    assert candidates(()) == [None]


class Still(nn.Module):
    """Predicts no displacement."""

    interpolator: str = "bspline"

    @nn.compact
    def __call__(self, fixed, moving, *, grid_size):
        return Prediction(jnp.zeros((*fixed.shape[:4], 3)), control_grid=jnp.zeros((len(fixed), *grid_size, 3)))


def test_instance_optimisation_sees_what_both_images_show():
    shape, rng = (16, 18, 17), np.random.default_rng(0)
    smooth = np.sin(0.9 * np.indices(shape)).sum(0) + 0.05 * rng.normal(size=shape)
    known = np.zeros(shape, bool)
    known[3:-4, 2:, :-3] = True
    moving_known = np.roll(known, 2, axis=0)
    refinement = dict(steps=10, bending=1.0, folding=100.0, learning_rate=0.1)
    predict = make_predict(Still(), refinement=refinement)

    def found(fixed_beyond, **views):
        fixed = np.where(known, smooth, fixed_beyond)
        moving = np.where(moving_known, np.roll(smooth, 1, axis=1), 0)
        arrays = dict(fixed=fixed[..., None], moving=moving[..., None])
        batch = {name: jnp.asarray(array[None], jnp.float32) for name, array in arrays.items()}
        return predict({}, batch | {name: jnp.asarray(view[None]) for name, view in views.items()}, (5, 5, 5))

    views = dict(fixed_known=known, moving_known=moving_known)
    plain = found(0, **views)["displacement"]
    assert np.abs(plain).max() > 0.1
    # The fixed image has no influence beyond what is known.
    np.testing.assert_allclose(found(9, **views)["displacement"], plain, atol=1e-5)
    assert np.abs(found(9)["displacement"] - found(0)["displacement"]).max() > 0.1
    # Nor has the fixed image where the moving one shows nothing.
    unseen = np.where(moving_known, 0, 9)
    np.testing.assert_allclose(found(unseen, **views)["displacement"], plain, atol=1e-5)
