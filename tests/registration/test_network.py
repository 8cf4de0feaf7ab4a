"""A network's proposal, from a network whose map is known."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from flax import linen as nn

from gridreg_jax import geometry
from gridreg_jax.data.nifti import Volume
from gridreg_jax.data.preprocess import Lattice, lattice_affine, place
from gridreg_jax.errors import InputError
from gridreg_jax.models import build
from gridreg_jax.models.prediction import Prediction
from gridreg_jax.registration import deformable, network
from gridreg_jax.registration import register as call
from gridreg_jax.registration.deformable import PRESETS, Stage, StageResult, deform
from gridreg_jax.registration.network import propose
from gridreg_jax.training import trained
from gridreg_jax.training.trained import Trained
from gridreg_jax.transforms.interpolation import interpolate
from gridreg_jax.transforms.warp import identity_grid

SHAPE, SPACING = (24, 28, 20), (4.0, 3.5, 5.0)
# Of the network's displacement (voxels) from its voxels, a linear map.
LINEAR = np.array([[0.02, 0.03, 0.0], [-0.04, 0.05, 0.01], [0.0, -0.02, 0.03]], np.float32)


class Known(nn.Module):
    """Predicts `LINEAR` times the distance from the middle, and half a voxel of uncertainty along x.

    With a label, its probability is that of the image's intensity.
    """

    bayesian: bool = False
    labels: int = 0

    @nn.compact
    def __call__(self, fixed, moving, *, grid_size, train=False):
        points = identity_grid(fixed.shape[1:4]) - (np.array(fixed.shape[1:4]) - 1) / 2
        displacement = (points @ LINEAR.T)[None]
        variance = jnp.zeros_like(displacement).at[..., 0].set(0.25) if self.bayesian else None
        told = tuple(jnp.concatenate([-4 * image, 4 * image], axis=-1) for image in (fixed, moving))
        return Prediction(displacement, variance=variance, segmentation=told if self.labels else None)


def known(**fields):
    data = {"shape": SHAPE, "spacing": SPACING, "center": "mass"}
    return Trained(Known(**fields), {}, {"data": data, "refinement": {"steps": 0}}, (4, 4, 4))


@pytest.fixture(scope="module")
def pair(phantom, lattice, turn):
    """Oblique and mirrored images of one body; the moving one is far away."""
    body = phantom(seed=4)
    axes = turn(20, 2) @ np.eye(3)[:, [1, 0, 2]]
    fixed = body.volume((30, 26, 34), lattice((30, 26, 34), (3.0, 3.2, 3.0), axes))
    far = nib.affines.from_matvec(np.eye(3), [150.0, 20, -30])
    other = lattice((28, 30, 30), (3.2, 3.0, 3.0), turn(-10, 0) @ np.diag([1.0, -1.0, 1.0]))
    moving = body.volume((28, 30, 30), other)
    return fixed, dataclasses.replace(moving, affine=far @ moving.affine)


def expected(pair, points_mm):
    """Where the network of this file takes points: through its two lattices."""
    fixed, moving = (lattice_affine(volume, Lattice(SHAPE, SPACING)) for volume in pair)
    voxels = geometry.world_to_voxel(points_mm, fixed)
    return geometry.voxel_to_world(voxels + (voxels - (np.array(SHAPE) - 1) / 2) @ LINEAR.T, moving)


def test_the_proposal_is_the_networks_map_in_world_space(pair):
    proposal = propose(known(bayesian=True), *pair, pair[0])
    voxels = np.random.default_rng(0).integers([8, 8, 10], [22, 18, 24], (100, 3))  # on the network's lattice too
    points_mm = geometry.voxel_to_world(voxels + proposal.displacement[tuple(voxels.T)], pair[0].affine)
    found = geometry.voxel_to_world(points_mm, proposal.matrix)
    np.testing.assert_allclose(found, expected(pair, geometry.voxel_to_world(voxels, pair[0].affine)), atol=1e-3)
    np.testing.assert_allclose(proposal.sigma_mm, 0.5 * SPACING[0], rtol=1e-5)


def test_maps_of_labels_lie_where_the_images_do(pair):
    proposal = propose(known(labels=1), *pair, pair[0])
    assert propose(known(), *pair, pair[0]).label_maps is None
    for (told,), volume in zip(proposal.label_maps, pair, strict=True):
        on_lattice = place(volume, Lattice(SHAPE, SPACING))
        np.testing.assert_allclose(told.affine, on_lattice.affine)
        np.testing.assert_allclose(told.array, 1 / (1 + np.exp(-8 * on_lattice.image)), atol=1e-5)


def test_maps_of_labels_guide_the_deformation_where_the_images_say_nothing():
    affine, steps = np.diag([2.0, 2.5, 3.0, 1.0]), np.array([2.0, 2.5, 3.0])
    shape, shift_mm = (24, 20, 18), np.array([3.0, -2.0, 2.5])
    flat = Volume(np.zeros(shape, np.float32), affine, Path("flat"))
    middle = (np.array(shape) - 1) / 2 * steps

    def blob(center, spacing):
        voxels = np.rint(np.multiply(shape, steps) / spacing).astype(int)
        distance = np.moveaxis(np.indices(voxels), 0, -1) * spacing - center
        array = np.exp(-np.sum((distance / 9) ** 2, axis=-1)).astype(np.float32)
        return Volume(array, np.diag([*spacing, 1.0]), Path("blob"))

    preset = dataclasses.replace(PRESETS["fast"], stages=(Stage(1, 0, 80, 0.01),))
    options = dict(preset=preset, grid=5, start=np.zeros((*shape, 3), np.float32))
    maps = ([blob(middle, steps)], [blob(middle + shift_mm, np.full(3, 2.2))])
    found = deform(flat, flat, np.eye(4), label_maps=maps, **options)[0]
    dense = interpolate(jnp.asarray(found[None]), shape, method="bspline")[0]
    np.testing.assert_allclose(dense[tuple(np.array(shape) // 2)] * steps, shift_mm, atol=0.5)
    assert np.abs(deform(flat, flat, np.eye(4), **options)[0]).max() < 1e-3


def test_a_run_of_another_version_is_named(pair, monkeypatch):
    other = dataclasses.replace(known(), model=build("gridreg", levels=4), params={"params": {}})
    monkeypatch.setattr(trained, "load_trained", lambda workdir, notify: other)
    with pytest.raises(InputError, match="run: parameters of another version, which do not fit"):
        call(*pair, model="run")


def test_registration_begins_with_the_network(pair, monkeypatch):
    monkeypatch.setattr(trained, "load_trained", lambda workdir, notify: known())
    found = call(*pair, model="run", grid=6)
    points_mm = np.random.default_rng(1).uniform(-20, 20, (50, 3))
    np.testing.assert_allclose(found.map_points(points_mm), expected(pair, points_mm), atol=0.1)
    assert [stage.similarity for stage in found.stages] == [()]
    refined = call(*pair, model="run", grid=6, refine=15)
    assert sum(len(stage.similarity) for stage in refined.stages) == 15
    assert all(stage.similarity[-1] < stage.similarity[0] for stage in refined.stages)
    # The two images are one: refinement comes closer to the shift between them than the network's map.
    true = points_mm + [150.0, 20, -30]
    errors = [np.linalg.norm(each.map_points(points_mm) - true, axis=1).mean() for each in (found, refined)]
    assert errors[1] < 0.8 * errors[0]
    monkeypatch.setattr(trained, "load_trained", lambda workdir, notify: known(labels=1))
    told = call(*pair, model="run", grid=6, refine=15)
    assert np.abs(told.control_grid - refined.control_grid).max() > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine": 5}, "refine, 5, .* give a model or ncf"),
        ({"refine": -1, "model": "run"}, "number of steps from 0"),
        ({"affine": "rigid", "model": "run"}, "brings its own alignment"),
        ({"model": "nowhere"}, "nowhere: holds no run"),
    ],
)
def test_options_that_contradict_each_other(pair, options, message):
    with pytest.raises(InputError, match=message):
        call(*pair, **options)


def test_a_spline_through_a_displacement():
    from gridreg_jax.registration.deformable import _fitted

    control_grid = np.random.default_rng(2).normal(size=(5, 6, 4, 3)).astype(np.float32)
    dense = np.asarray(interpolate(jnp.asarray(control_grid[None]), (12, 9, 15), method="bspline")[0])
    np.testing.assert_allclose(_fitted(dense, (5, 6, 4)), control_grid, atol=1e-4)


def test_ncf_finds_a_known_deformation(phantom, lattice):
    affine, shape = lattice((26, 28, 24), (4.0, 4.0, 4.0), np.eye(3)), (26, 28, 24)

    def true(points_mm):
        return points_mm + 6 * np.sin(points_mm[..., [1, 2, 0]] / 25 + [0.3, 1, 2])

    body = phantom(seed=2)
    fixed, moving = body.volume(shape, affine, true), body.volume(shape, affine)
    found = call(fixed, moving, method="ncf", affine="off", grid=8)
    assert found.control_grid.shape == (8, 8, 8, 3) and found.certificate.invertible
    points = np.random.default_rng(0).uniform(-25, 25, (200, 3))
    errors, before = (np.linalg.norm(end - true(points), axis=-1).mean() for end in (found.map_points(points), points))
    assert errors < 0.4 * before


@pytest.mark.parametrize(("options", "voxels"), [({}, 8000), ({"method": "ncf"}, 1000)])
def test_the_lattice_is_that_of_the_preset_and_the_smallest_for_ncf(pair, monkeypatch, options, voxels):
    for preset, budget in (("fast", 1000), ("balanced", 8000)):
        monkeypatch.setitem(PRESETS, preset, dataclasses.replace(PRESETS[preset], voxels=budget))
    monkeypatch.setattr(network, "fit_ncf", lambda fixed, *_: np.zeros((*fixed.array.shape, 3), np.float32))
    nothing = StageResult((4, 4, 4), SHAPE, ())
    monkeypatch.setattr(deformable, "load", lambda *_, **__: None)
    monkeypatch.setattr(deformable, "_run", lambda *_, **__: (np.zeros((4, 4, 4, 3), np.float32), nothing))
    found = call(*pair, affine=pair[1].affine @ np.linalg.inv(pair[0].affine), **options)
    assert 0.4 * voxels < found.fixed_working.array.size < 1.2 * voxels


class Elsewhere(nn.Module):
    """As `Known`, of another package."""

    @nn.compact
    def __call__(self, fixed, moving, *, grid_size, train=False):
        return Known().apply({}, fixed, moving, grid_size=grid_size)


def test_programs_with_code_from_elsewhere_are_not_stored(pair, program_cache, monkeypatch):
    monkeypatch.setattr(Known, "__module__", "gridreg_jax.models.known")
    found = propose(dataclasses.replace(known(), model=Elsewhere()), *pair, pair[0]).displacement
    assert not (program_cache / "programs").exists()
    expected = propose(known(), *pair, pair[0]).displacement
    assert len(list((program_cache / "programs").iterdir())) == 1
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_damaged_checkpoint_of_the_network_is_told(pair, monkeypatch):
    def load_trained(workdir, notify):
        notify("checkpoint 3 is damaged and passed over")
        raise InputError("and no other one is there")

    monkeypatch.setattr(trained, "load_trained", load_trained)
    with pytest.warns(UserWarning, match="3 is damaged"), pytest.raises(InputError, match="no other one"):
        call(*pair, model="run")
