"""Every config and variant: the same options, a model that can be built, and the paper's numbers where it is named."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from configs import default
from configs.models import MODELS
from gridreg_jax.models import build, describe
from gridreg_jax.training.loop import check_config
from gridreg_jax.training.step import build_run

VARIANTS = [
    ("brain", "cpu"),
    ("brain", "paper"),
    ("hippocampus", ""),
    ("hippocampus", "cpu"),
    ("prostate", "paper"),
    ("prostate", "cpu"),
    ("pelvis", "paper"),
    ("pelvis", "cpu"),
    ("brain", "paper,voxelmorph"),
    ("hippocampus", "voxelmorph_probabilistic,cpu"),
    ("prostate", "transmorph_tiny"),
    ("pelvis", "cpu,voxelmorph_1"),
]


def get_config(name, *variant):
    return importlib.import_module(f"configs.{name}").get_config(*variant)


def options(config):
    """What can be set, the fields of the model aside."""
    return {n: sorted(value) if hasattr(value, "keys") else None for n, value in config.items() if n != "model"}


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_variant_builds_and_has_every_option(name, variant):
    config = get_config(name, variant)
    assert options(config) == options(default.get_config())
    model = next((part for part in variant.split(",") if part in MODELS), "")
    assert config.name == (f"{name}_{model}" if model else name)
    config = config.to_dict()
    check_config(config)
    run = build_run(config)
    image = jax.ShapeDtypeStruct((1, *run.shape, 1), jnp.float32)

    def begin(fixed, moving):
        prediction, params = run.model.init_with_output(jax.random.key(0), fixed, moving, grid_size=run.grid_size)
        return prediction.displacement, run.optimizer.init(params)

    assert jax.eval_shape(begin, image, image)[0].shape == (1, *run.shape, 3)


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


@pytest.mark.parametrize("name", MODELS)
def test_another_system_is_described_in_full(name):
    fields = get_config("brain", name).model.to_dict()
    assert describe(build(**fields)) == fields


def test_the_windows_of_transmorph_suit_the_image():
    assert get_config("brain", "paper,transmorph").model.window == (5, 7, 6)
    assert get_config("hippocampus", "transmorph").model.window == (2, 2, 2)


def test_another_system_comes_with_its_authors_optimiser_and_weights_and_leaves_the_rest():
    plain, other = get_config("hippocampus", "cpu"), get_config("hippocampus", "cpu,voxelmorph_1")
    assert (other.grid_sizes, other.refinement.steps) == ((), 0)
    assert (other.optimizer.name, other.optimizer.learning_rate, other.optimizer.decay) == ("adam", 1e-4, False)
    assert (other.loss.gradient, other.loss.bending, other.loss.folding, other.loss.grid) == (0.01, 0, 0, 0)
    assert get_config("brain", "voxelmorph_1").loss.gradient == 1.0  # with local correlation
    for name in ("data", "augmentation", "steps", "batch_size"):
        assert plain[name] == other[name]
    assert (plain.loss.similarity, plain.loss.dice) == (other.loss.similarity, other.loss.dice)
