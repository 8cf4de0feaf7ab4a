"""The benchmarks: their networks in PyTorch (one is the JAX network, one the published one), and their arguments."""

import importlib
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gridreg_jax.models import build
from gridreg_jax.training.objective import objective

ROOT = Path(__file__).parents[1]
SHAPE, GRID = (16, 20, 16), (5, 4, 6)
TINY = dict(levels=4, width=4, projection=8, decoder=8, heads=2)
SCRIPTS = ("kernels", "models", "scaling", "versus_torch")
WEIGHTS = dict(num_labels=2, dice=1.0, bending=50.0)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def make_batch():
    rng = np.random.default_rng(0)
    batch = {name: rng.uniform(size=(1, *SHAPE, 1)).astype(np.float32) for name in ("fixed", "moving")}
    return batch | {f"{name}_labels": rng.integers(0, 3, (1, *SHAPE), dtype=np.int32) for name in batch}


@pytest.mark.parametrize(("interpolator", "contrast_window"), [("bspline", 0), ("trilinear", 5)])
def test_same_displacement_loss_and_gradient_as_in_torch(torch, interpolator, contrast_window):
    from benchmarks import torch_gridreg

    fields, batch = TINY | dict(interpolator=interpolator, contrast_window=contrast_window), make_batch()
    model = build("gridreg", **fields)

    def loss(params, batch):
        prediction = model.apply(params, batch["fixed"], batch["moving"], grid_size=GRID)
        return objective(prediction, batch, interpolator=interpolator, grid=0.0, **WEIGHTS)[0].sum(), prediction

    # Random in every leaf: the head is zero at the start.
    image = jax.ShapeDtypeStruct((1, *SHAPE, 1), jnp.float32)
    shapes = jax.eval_shape(lambda *pair: model.init(jax.random.key(0), *pair, grid_size=GRID), image, image)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes)
    (expected, prediction), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)

    module = torch_gridreg.load_flax_params(torch_gridreg.GridReg(**fields), params)
    images = {name: torch.from_numpy(np.moveaxis(batch[name], -1, 1)) for name in ("fixed", "moving")}
    labels = {name: torch.from_numpy(batch[name]) for name in ("fixed_labels", "moving_labels")}
    displacement, control_grid = module(images["fixed"], images["moving"], GRID)
    found = torch_gridreg.objective(displacement, control_grid, images | labels, interpolator=interpolator, **WEIGHTS)
    found.sum().backward()

    assert np.abs(prediction.displacement).max() > 1
    np.testing.assert_allclose(displacement.detach(), prediction.displacement, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.detach(), [expected], rtol=1e-5)
    # Gradients are laid out as parameters are.
    gradients = torch_gridreg.load_flax_params(torch_gridreg.GridReg(**fields), gradient)
    assert sum(p.numel() for p in module.parameters()) == sum(leaf.size for leaf in jax.tree.leaves(params))
    for (name, parameter), wanted in zip(module.named_parameters(), gradients.parameters(), strict=True):
        if name.startswith("encoder") and name.endswith("bias"):
            continue  # the norm that follows takes it away: rounding alone
        wanted = wanted.detach().numpy()
        error = np.abs(parameter.grad.numpy() - wanted).max()
        assert error <= 1e-3 * np.abs(wanted).max(), name


def test_the_published_network_has_its_parameters_and_sees_voxels_everywhere(torch):
    from benchmarks import torch_published

    module = torch_published.PublishedGridReg()
    encoder = sum(p.numel() for p in module.levels.parameters())
    # The count of all is 333 999, of which 28 800 and 792 belong to layers that never run.
    assert (encoder, sum(p.numel() for p in module.parameters())) == (208_432, 333_999 - 28_800 - 792)
    fixed, moving = torch.rand(2, 1, 1, 32, 32, 24, requires_grad=True)
    displacement, control_grid = module(fixed, moving, (4, 5, 6))
    assert displacement.shape == (1, 32, 32, 24, 3) and control_grid.shape == (1, 4, 5, 6, 3)
    corners = displacement.detach()[0, [0, -1]][:, [0, -1]][:, :, [0, -1]]
    np.testing.assert_allclose(corners, control_grid.detach()[0, [0, -1]][:, [0, -1]][:, :, [0, -1]], atol=1e-5)
    assert (torch.autograd.grad(control_grid[0, 0, 0, 0].sum(), moving)[0] != 0).float().mean() > 0.99


def test_inference_in_torch_is_without_dropout(torch, tmp_path):
    from benchmarks.versus_torch import Torch

    system = Torch(Namespace(against="published", shape=(32, 32, 24), grid=4), tmp_path)
    system.train()
    assert np.array_equal(system.inference(), system.inference())
    system.train()
    assert system.model.training


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        *((script, "--repeats 0", "1 or more") for script in SCRIPTS),
        *((script, "--out missing/x.json", "a folder that exists") for script in SCRIPTS),
        ("versus_torch", "--grid 3", "bspline needs 4 or more"),
        ("versus_torch", "--contrast_window 4", "odd"),
        ("kernels", "--shape 8 8 x", "3 or more"),
        ("models", "--grid 1", "2 or more"),
        ("models", "--only nothing", "nothing not known; known are gridreg, gridreg_pointwise, "),
        ("scaling", "--grids 3", "two or more"),
        ("scaling", "--sizes 64 64", "two or more"),
        ("scaling", "--peak_gbs 100", "both or neither"),
        ("register", "missing.csv", "missing.csv: cannot be read"),
        ("register", "pairs.csv", "row 2: no such file: a.nii"),
        ("register", "pairs.csv --task none", "no row is of dataset '' and task 'none'"),
        ("register", "pairs.csv --preset x", "'x' (choose from "),
        ("register", "pairs.csv --runs 0", "1 or more"),
        ("register", "pairs.csv --out missing/x.json", "a folder that exists"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_measured(
    script, arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text("fixed,moving,fixed_labels,moving_labels,task\na.nii,b.nii,c.nii,d.nii,all\n")
    module = importlib.import_module(f"benchmarks.{script}")
    monkeypatch.delattr(module, "cases" if script == "kernels" else "measure")
    monkeypatch.setattr(sys, "argv", [script, *arguments.split()])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("how", [["benchmarks/versus_torch.py"], ["-m", "benchmarks.versus_torch"]])
def test_the_comparison_starts_as_a_file_and_as_a_module(how):
    done = subprocess.run([sys.executable, *how, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--against" in done.stdout, done.stderr
