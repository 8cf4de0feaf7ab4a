"""Systems that need no training: their maps as displacements in voxels, what is remembered, and their evaluation."""

import csv
import functools
import json
import tempfile

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from configs import brain
from gridreg_jax import geometry
from gridreg_jax.baselines import SYSTEMS, ants, network
from gridreg_jax.baselines.program import Program, displacement_in_voxels
from gridreg_jax.cores import cores
from gridreg_jax.data import nifti
from gridreg_jax.errors import InputError
from gridreg_jax.evaluation.evaluate import evaluate_system
from gridreg_jax.export import itk, itk_files
from gridreg_jax.ncf import optimise

SHAPE = (24, 20, 28)


def oblique_affine():
    """Turned about two axes, mirrored, with a spacing of its own along each axis."""
    turn = nib.eulerangles.euler2mat(0.3, -0.2, 0.1) @ np.diag([-1.0, 1.0, 1.0])
    return nib.affines.from_matvec(turn * [1.5, 2.0, 1.2], [-30.0, 12.5, 41.0])


def blobs(displacement=0.0, seed=0):
    """A smooth image on the lattice, sampled at voxels that are displaced."""
    points = np.moveaxis(np.indices(SHAPE), 0, -1) + displacement
    rng = np.random.default_rng(seed)
    centers, widths = rng.uniform(0.25, 0.75, (6, 3)) * SHAPE, rng.uniform(2.0, 4.0, 6)
    squared = [((points - center) ** 2).sum(-1) / width**2 for center, width in zip(centers, widths, strict=True)]
    return sum(np.exp(-distance / 2) for distance in squared).astype(np.float32)


def test_warp_and_affine_become_one_displacement_in_voxels_as_simpleitk_maps_points(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    affine, rng = oblique_affine(), np.random.default_rng(0)
    itk_files.save_displacement(tmp_path / "warp.nii.gz", rng.normal(size=(*SHAPE, 3)), affine)
    matrix = nib.affines.from_matvec(np.eye(3) + 0.1 * rng.normal(size=(3, 3)), [3.0, -2.0, 1.0])
    itk_files.write_tfm(tmp_path / "affine.tfm", [itk.affine_transform(matrix)])

    found = displacement_in_voxels(
        tmp_path / "warp.nii.gz", lambda points: geometry.voxel_to_world(points, matrix), affine
    )

    field = sitk.ReadImage(str(tmp_path / "warp.nii.gz"), sitk.sitkVectorFloat64)
    lattice = sitk.Image(field.GetSize(), sitk.sitkFloat32)
    lattice.CopyInformation(field)
    warp, linear = sitk.DisplacementFieldTransform(field), sitk.ReadTransform(str(tmp_path / "affine.tfm"))
    for voxel in rng.integers(1, np.array(SHAPE) - 1, (50, 3)).tolist():
        point = linear.TransformPoint(warp.TransformPoint(lattice.TransformIndexToPhysicalPoint(voxel)))
        expected = np.array(lattice.TransformPhysicalPointToContinuousIndex(point)) - voxel
        np.testing.assert_allclose(found[tuple(voxel)], expected, atol=1e-4)


def program(**changes):
    """A program that shifts by 1 mm along x, and the list of its calls."""
    calls = []

    def register(folder, settings, threads):
        fixed = nib.load(folder / "fixed.nii")
        calls.append(settings)
        vectors = np.broadcast_to([1.0, 0.0, 0.0], (*fixed.shape, 3))
        itk_files.save_displacement(folder / "warp.nii", vectors, fixed.affine)
        return folder / "warp.nii", lambda points: points

    fields = dict(register=register, settings="fast", package="numpy", extra="none") | changes
    return Program(**fields), calls


def test_a_registration_is_done_once(tmp_path, monkeypatch):
    fixed, moving, affine = blobs(), blobs(seed=1), np.diag([2.0, 1.0, 1.0, 1.0])
    known, calls = program()
    options = dict(seed=0, cache_dir=tmp_path)
    first, seconds = known(fixed, moving, affine, **options)
    np.testing.assert_allclose(first, np.broadcast_to([0.5, 0.0, 0.0], first.shape), atol=1e-6)
    again, seconds_again = known(fixed, moving, affine, **options)
    np.testing.assert_array_equal(again, first)
    assert (len(calls), seconds_again) == (1, seconds)
    # All that the result depends on makes it another.
    known(moving, fixed, affine, **options)
    known(fixed, moving, np.eye(4), **options)
    Program(known.register, "slow", package="numpy", extra="none")(fixed, moving, affine, **options)
    monkeypatch.setattr("gridreg_jax.baselines.program.cores", lambda: 1 + cores())
    known(fixed, moving, affine, **options)
    monkeypatch.setattr(Program, "version", lambda self: "0")
    known(fixed, moving, affine, **options)
    assert len(calls) == 6 == len([*tmp_path.iterdir()])


def test_a_damaged_result_is_computed_anew(tmp_path):
    known, calls = program()
    images = (blobs(), blobs(seed=1), np.eye(4))
    first, _ = known(*images, seed=0, cache_dir=tmp_path)
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(entry.read_bytes()[:200])
    np.testing.assert_array_equal(known(*images, seed=0, cache_dir=tmp_path)[0], first)
    assert len(calls) == 2


def test_a_program_that_is_not_installed_is_named_with_its_extra(tmp_path):
    absent, calls = program(package="no-such-package", extra="more")
    with pytest.raises(InputError, match=r"no-such-package is not installed: pip install 'gridreg_jax\[more\]'"):
        absent(blobs(), blobs(), np.eye(4), seed=0, cache_dir=tmp_path)
    assert not calls


@pytest.mark.parametrize(("module", "name"), [("ants", "ants_syn"), ("picsl_greedy", "greedy")])
def test_a_program_finds_a_known_displacement_on_an_oblique_lattice(tmp_path, module, name):
    pytest.importorskip(module)
    true = np.array([1.5, -1.0, 2.0])
    moving = blobs()
    fixed, affine = blobs(true), oblique_affine()
    displacement, _ = SYSTEMS[name](fixed, moving, affine, seed=0, cache_dir=tmp_path)
    errors = np.linalg.norm(displacement - true, axis=-1)[fixed > 0.3]
    assert errors.mean() < 0.15 * np.linalg.norm(true)


def test_the_displacement_warps_as_ants_does(tmp_path):
    antspy = pytest.importorskip("ants")
    stretch = 0.08 * (np.moveaxis(np.indices(SHAPE), 0, -1) - np.array(SHAPE) / 2)
    images = {"fixed": blobs(stretch), "moving": blobs()}
    for side, image in images.items():
        nifti.save(tmp_path / f"{side}.nii", image, oblique_affine())
    warp, linear = ants.register(tmp_path, "SyN", 1)
    displacement = displacement_in_voxels(warp, linear, oblique_affine())
    points = np.indices(SHAPE) + np.moveaxis(displacement, -1, 0)
    ours = ndimage.map_coordinates(images["moving"], points, order=1)
    fixed, moving = (antspy.image_read(str(tmp_path / f"{side}.nii")) for side in images)
    transforms = [str(warp), str(tmp_path / "ants0GenericAffine.mat")]
    theirs = antspy.apply_transforms(fixed, moving, transforms, singleprecision=False).numpy()
    inside = np.all([(axis > 0) & (axis < size - 1) for axis, size in zip(points, SHAPE, strict=True)], axis=0)
    assert inside.mean() > 0.7
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=1e-4)
    assert np.abs(ours - images["fixed"]).mean() < 0.5 * np.abs(images["moving"] - images["fixed"]).mean()


def test_a_system_is_evaluated_like_a_run(subjects_csv, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(network, "optimise", functools.partial(optimise, steps=20))
    config = brain.get_config()
    config.data.update(shape=(16, 20, 16), spacing=(1.0, 1.0, 1.0), center="image", subjects=str(subjects_csv))
    config.lock()  # as on the command line
    summary = evaluate_system("ncf", config, out=tmp_path)
    assert (summary["system"], summary["threads"], summary["cases"]) == ("ncf", cores(), 2)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    with open(tmp_path / "cases.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert sorted((row["fixed"], row["moving"]) for row in rows) == [("image6", "image7"), ("image7", "image6")]
    assert rows[0].keys() > {"dice_after_3", "tre_mm_after", "hd95_mm_after", "centroid_mm_after", "ndv_percent"}
    learn2reg = {"learn2reg_dice", "learn2reg_hd95_voxels", "learn2reg_tre_mm", "learn2reg_sd_log_jacobian"}
    assert rows[0].keys() > learn2reg | {"lumir_ndv_percent"}
    assert all(float(row["mse_after"]) < float(row["mse_before"]) for row in rows)
    assert {path.name for path in tmp_path.glob("*.png")} == {"case00.png", "case01.png"}
    assert f"2 cases, ncf with {cores()} threads" in capsys.readouterr().out


def test_greedy_works_in_a_folder_whose_name_has_a_space(tmp_path, monkeypatch):
    pytest.importorskip("picsl_greedy")
    (tmp_path / "a space").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a space"))
    options = dict(seed=0, cache_dir=tmp_path)
    displacement, _ = SYSTEMS["greedy"](blobs([1.0, 0.0, 0.0]), blobs(), oblique_affine(), **options)
    assert displacement.shape == (*SHAPE, 3)
