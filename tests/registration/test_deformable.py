import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from gridreg_jax import geometry
from gridreg_jax.data.nifti import Volume
from gridreg_jax.errors import InputError
from gridreg_jax.registration import deformable
from gridreg_jax.registration.deformable import (
    PRESETS,
    Preset,
    Stage,
    deform,
    finest_shape,
    last_cells,
    on_lattice,
    refining,
)
from gridreg_jax.transforms.interpolation import axis_weights

SHAPE = (32, 36, 30)
BUDGET = 750_000
QUICK = Preset(BUDGET, 4.0, (Stage(2, 1, 30, 2.0), Stage(1, 0, 20, 2.0)))


def volume(shape, spacing):
    return Volume(np.broadcast_to(np.float32(0), shape), np.diag([*spacing, 1.0]), Path("image"))


def test_the_working_lattice_keeps_to_its_budget():
    assert finest_shape(volume((162, 214, 167), (1, 1, 1)), BUDGET) == (80, 104, 88)
    # Small images share shapes, slices stay as few as they are.
    assert finest_shape(volume((30, 40, 50), (1, 1, 1)), BUDGET) == (32, 40, 56)
    assert finest_shape(volume((100, 100, 10), (1, 1, 9)), BUDGET) == (104, 104, 10)
    assert finest_shape(volume((300, 300, 20), (1, 1, 0.5)), BUDGET)[2] == 8
    thick = finest_shape(volume((512, 512, 20), (0.5, 0.5, 5.0)), BUDGET)
    assert thick[2] == 20 and 0.8 * BUDGET < np.prod(thick) < 1.2 * BUDGET


def smooth_displacement(points_mm, amplitude):
    """A smooth map of mm with a period of 80 mm."""
    phases = points_mm[..., [1, 2, 0]] * 2 * np.pi / 80
    return amplitude * np.sin(phases + [0.3, 1.0, 2.0])


def at_voxels(control_grid, shape):
    """The cubic spline of a control grid at the voxels of a lattice."""
    matrices = [axis_weights("bspline", g, n) for g, n in zip(control_grid.shape[:3], shape, strict=True)]
    return np.einsum("ai,bj,ck,ijkd->abcd", *matrices, control_grid, optimize=True)


@pytest.fixture(scope="module")
def known(phantom, lattice):
    """A pair on one lattice and the map between them."""
    body, affine = phantom(seed=3), lattice(SHAPE, (3.0, 3.0, 3.0), np.eye(3))
    fixed = body.volume(SHAPE, affine, lambda x: x + smooth_displacement(x, 4.0))
    return fixed, body.volume(SHAPE, affine), affine


@pytest.mark.parametrize("method", ["grid", "symmetric"])
def test_a_known_smooth_deformation_is_found(known, method):
    fixed, moving, affine = known
    control_grid, certificate, stages, flow_error_mm = deform(fixed, moving, np.eye(4), preset=QUICK, method=method)
    found_mm = 3.0 * at_voxels(control_grid, SHAPE)
    voxels = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    points_mm = geometry.voxel_to_world(voxels, affine)
    true_mm = smooth_displacement(points_mm, 4.0)
    inside = np.linalg.norm(points_mm, axis=-1) < 30  # where there is something to see
    assert np.linalg.norm(found_mm - true_mm, axis=-1)[inside].mean() < 0.25 * np.linalg.norm(true_mm, axis=-1).mean()
    assert certificate.invertible
    assert [(stage.grid_size, stage.remaining) for stage in stages] == [((7, 7, 7), 1), ((11, 11, 11), 0)]
    assert all(stage.similarity[-1] < stage.similarity[0] for stage in stages)
    assert (flow_error_mm is None) == (method == "grid")
    assert method == "grid" or 0 < flow_error_mm < 0.3


def test_what_lies_beyond_the_fixed_field_of_view_is_reached(phantom, lattice):
    body, shape, shift_mm = phantom(seed=3), (20, 20, 20), np.array([6.0, -6.0, 0.0])
    small, whole = lattice(shape, (3.0, 3.0, 3.0), np.eye(3)), lattice((40, 40, 40), (3.0, 3.0, 3.0), np.eye(3))
    fixed = body.volume(shape, small, lambda x: x + shift_mm)
    moving = body.volume((40, 40, 40), whole)
    errors = []
    for field_of_view in (moving, body.volume(shape, small)):  # the whole, and what the fixed image shows
        control_grid, *_ = deform(fixed, field_of_view, np.eye(4), preset=QUICK)
        found_mm = 3.0 * at_voxels(control_grid, shape)
        # The two sides where the map leads out of the fixed field of view.
        error = np.linalg.norm(found_mm - shift_mm, axis=-1)
        errors.append(max(error[-3:].mean(), error[:, :3].mean()))
    assert errors[0] < 1.0 < errors[1]


@pytest.mark.parametrize("options", [{}, {"method": "velocity", "similarity": "ncc"}, {"start": 0, "grid": 8}])
def test_what_is_loaded_is_what_is_run(known, monkeypatch, options):
    fixed, moving, _ = known
    calls, preset = {"load": [], "run": []}, dataclasses.replace(QUICK, stages=QUICK.stages[-1:])

    def noted(what, arguments, static):
        types = [(np.shape(leaf), leaf.dtype) for leaf in jax.tree.leaves(arguments)]
        calls[what].append((types, jax.tree.structure(arguments), static))

    def run(*arguments, steps, **static):
        noted("run", arguments, {"steps": steps, **static})
        return arguments[0], np.zeros((steps, 1))

    run.load = lambda *arguments, **static: noted("load", arguments, static)
    monkeypatch.setattr(deformable, "_fit", run)
    from_start = "start" in options
    if from_start:
        options = options | {"start": np.zeros((*SHAPE, 3), np.float32)}
    deform(fixed, moving, np.eye(4), preset=preset, mask=fixed, **options)
    named = {name: value for name, value in options.items() if name != "start"}
    deformable.load(fixed, preset=preset, from_start=from_start, **named)
    assert calls["load"] == calls["run"] != []


def test_a_map_that_folds_is_mended(known, monkeypatch):
    fixed, moving, _ = known
    careless = Preset(BUDGET, 2.0, (Stage(1, 0, 40, 1e-4),))
    other = dataclasses.replace(fixed, array=np.ascontiguousarray(fixed.array[::-1, ::-1]))
    monkeypatch.setattr(deformable, "SMOOTHINGS", 0)
    _, certificate, *_ = deform(other, moving, np.eye(4), preset=careless)
    assert not certificate.invertible, "nothing to mend: the test shows nothing"
    monkeypatch.undo()
    _, certificate, *_ = deform(other, moving, np.eye(4), preset=careless)
    assert certificate.invertible


@pytest.mark.parametrize(("grid", "size"), [(6, (6, 6, 6)), (30.0, (6, 7, 6))])
def test_the_last_control_grid_can_be_chosen(known, grid, size):
    fixed, moving, _ = known
    stage = dataclasses.replace(QUICK.stages[0], halvings=0, steps=1)
    control_grid, *_ = deform(fixed, moving, np.eye(4), preset=Preset(BUDGET, 4.0, (stage,)), grid=grid)
    assert control_grid.shape[:3] == size


@pytest.mark.parametrize("grid", [3, 39, 0.5])
def test_an_impossible_grid_is_named(known, grid):
    fixed, moving, _ = known
    with pytest.raises(InputError, match="control grid has from 4 to 38|from that of a voxel"):
        deform(fixed, moving, np.eye(4), preset=QUICK, grid=grid)


@pytest.mark.parametrize("preset", PRESETS)
def test_cells_are_as_close_as_can_be_to_the_length_that_is_asked_for(preset):
    shape, spacing = np.array([112, 56, 9]), np.array([1.6, 1.6, 5.0])
    image, previous = volume(shape, spacing), np.full(3, np.inf)
    most = np.array([55, 27, 4])  # of at least two voxels
    for asked in np.geomspace(1.6, 500.0, 60):
        cells = np.array(last_cells(image, PRESETS[preset], float(asked)))
        for sides_mm, count, limit in zip((shape - 1) * spacing, cells, most, strict=True):
            possible = abs(sides_mm / np.arange(1, limit + 1) - asked)
            assert possible[count - 1] == possible.min(), (asked, cells)
        assert (cells <= previous).all()
        previous = cells
    assert previous.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("shape", "spacing", "preset", "cells"),
    [
        ((96, 128, 96), (1.7, 1.7, 1.7), "balanced", [28, 36, 28]),
        ((112, 136, 112), (1.6, 1.6, 1.6), "accurate", [48, 56, 48]),
        ((40, 56, 40), (0.9, 0.9, 0.9), "fast", [8, 12, 8]),
        # Ten thick slices: 13.7 cells would be as long as the others.
        ((160, 160, 10), (1.5, 1.5, 8.0), "balanced", [44, 44, 4]),
    ],
)
def test_cells_of_a_preset_are_whole_numbers_of_its_first_ones_where_there_is_room(shape, spacing, preset, cells):
    assert last_cells(volume(shape, spacing), PRESETS[preset], None) == cells


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("steps", [0, 1, 7, 20])
def test_what_follows_a_network_has_the_last_grid_alone_and_every_step(preset, steps):
    stages = refining(PRESETS[preset], steps).stages
    assert sum(stage.steps for stage in stages) == steps
    assert stages and all(stage.halvings == 0 for stage in stages)
    assert len(stages) == 1 or all(stage.steps for stage in stages)


def test_the_steps_after_a_network_are_shared_as_in_the_preset():
    stages = refining(PRESETS["balanced"], 20).stages  # 20 and 14 there
    assert [(stage.coarsening, stage.steps) for stage in stages] == [(2, 12), (1, 8)]


def test_an_image_of_few_voxels_is_not_coarsened_away(phantom, lattice):
    shape, spacing = (12, 14, 11), 8.0
    body, affine = phantom(seed=3), lattice(shape, (spacing,) * 3, np.eye(3))
    fixed = body.volume(shape, affine, lambda x: x + smooth_displacement(x, 8.0))
    control_grid, *_ = deform(fixed, body.volume(shape, affine), np.eye(4), preset=PRESETS["fast"])
    points_mm = geometry.voxel_to_world(np.moveaxis(np.indices(shape), 0, -1), affine)
    true_mm = smooth_displacement(points_mm, 8.0)
    error_mm = np.linalg.norm(spacing * at_voxels(control_grid, shape) - true_mm, axis=-1)
    inside = np.linalg.norm(points_mm, axis=-1) < 30
    assert error_mm[inside].mean() < 0.5 * np.linalg.norm(true_mm, axis=-1)[inside].mean()


def test_thick_slices_of_the_moving_image_are_no_edges(known):
    fixed, moving, affine = known
    slices = moving.array[:, :, :28].reshape(*SHAPE[:2], 7, 4).mean(-1)
    thick_affine = affine @ np.diag([1, 1, 4, 1])
    thick_affine[:3, 3] = geometry.voxel_to_world(np.array([0, 0, 1.5]), affine)
    thick = Volume(slices, thick_affine, Path("thick"))
    images = on_lattice(fixed, thick, None, np.eye(4), 1)
    blurred = on_lattice(fixed, moving, None, np.eye(4), 1)
    # A finer fixed image is blurred across the slices, one that is no finer stays as it is.
    assert np.abs(np.diff(images[0][0, ..., 0], axis=2)).max() < 0.7 * np.abs(np.diff(fixed.array, axis=2)).max()
    np.testing.assert_array_equal(blurred[0][0, ..., 0], fixed.array)
