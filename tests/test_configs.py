"""Every config and variant: the same options, a model that can be built, and the paper's numbers where it is named."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from configs import default
from gridreg_jax.errors import InputError
from gridreg_jax.training.loop import check_config
from gridreg_jax.training.step import build_run, replicated

VARIANTS = [
    ("brain", "cpu"),
    ("brain", "paper"),
    ("hippocampus", ""),
    ("hippocampus", "cpu"),
    ("prostate", "paper"),
    ("prostate", "cpu"),
    ("pelvis", "paper"),
    ("pelvis", "cpu"),
]


def get_config(name, *variant):
    return importlib.import_module(f"configs.{name}").get_config(*variant)


def options(config):
    return {name: sorted(value) if hasattr(value, "keys") else None for name, value in config.items()}


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_variant_builds_and_has_every_option(name, variant):
    config = get_config(name, variant)
    assert options(config) == options(default.get_config())
    assert config.name == name
    config = config.to_dict()
    try:
        check_config(config)
    except InputError as error:
        assert "batch_size" in str(error)  # more devices than the config was written for
    run = build_run(config)
    image = jax.ShapeDtypeStruct((1, *run.shape, 1), jnp.float32)
    params = run.state_shapes(replicated()).params

    def predict(params, fixed, moving):
        return run.model.apply(params, fixed, moving, grid_size=(10, 10, 10)).displacement

    assert jax.eval_shape(predict, params, image, image).shape == (1, *run.shape, 3)


@pytest.mark.parametrize("name", ["brain", "prostate", "pelvis"])
def test_the_variant_of_the_paper_is_the_paper(name):
    config = get_config(name, "paper")
    model, loss, optimizer = config.model, config.loss, config.optimizer
    assert (model.levels, model.width, model.interpolator, model.iterations) == (5, 16, "trilinear", 1)
    assert (optimizer.name, optimizer.learning_rate, optimizer.decay, optimizer.clip) == ("adam", 1e-4, False, 0)
    assert (loss.similarity, loss.dice) == ("mse", 0.0 if name == "brain" else 1.0)
    assert (config.batch_size, config.grid_sizes) == (4, (5, 8, 10, 15))
    pairs = {"brain": 3000, "prostate": 156, "pelvis": 313}[name]
    assert config.steps == pytest.approx(300 * pairs / 4, abs=1)


def test_the_weight_of_the_bending_energy_is_converted_to_voxels():
    # u_voxels = u_halves X / 2, so lambda |d2 u_halves|^2 = lambda (2 / X)^2 |d2 u_voxels|^2.
    assert get_config("prostate").loss.bending == pytest.approx(48.8, abs=0.05)


@pytest.mark.parametrize("name", ["brain", "hippocampus", "prostate", "pelvis"])
def test_an_unknown_variant_is_named(name):
    with pytest.raises(ValueError, match=f"configs/{name}.py:big: there is no such variant; there are .*cpu"):
        get_config(name, "big")
