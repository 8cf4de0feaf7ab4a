"""One registration of a small pair with awkward headers, and everything that can be done with it."""

import csv
import dataclasses
import functools
import json
import re
import warnings
from pathlib import Path

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

import gridreg_jax
from gridreg_jax import geometry
from gridreg_jax.data import nifti
from gridreg_jax.data.nifti import Volume
from gridreg_jax.errors import InputError
from gridreg_jax.export import itk, itk_files
from gridreg_jax.registration import results
from gridreg_jax.registration.register import Registration, given_affine, register
from gridreg_jax.transforms.interpolation import interpolate

FIXED, MOVING = (34, 30, 22), (28, 36, 33)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, phantom, lattice, turn, write_nifti):
    """Files of a pair: the fixed image oblique, with flipped and exchanged axes and thick slices."""
    folder, body = tmp_path_factory.mktemp("pair"), phantom(seed=1)
    axes = turn(15, 2) @ turn(8, 0) @ np.eye(3)[:, [1, 2, 0]] @ np.diag([-1.0, 1.0, -1.0])
    true = nib.affines.from_matvec(turn(12, 1) * [1.05, 1.0, 0.96], [12.0, -8.0, 5.0])

    def through(points_mm):
        wave = 2.5 * np.sin(points_mm[..., [1, 2, 0]] * 2 * np.pi / 90)
        return geometry.voxel_to_world(points_mm + wave, true)

    volumes = {
        "fixed": body.volume(FIXED, lattice(FIXED, (3.0, 3.0, 4.5), axes, (3.0, 1.0, -2.0)), through),
        "moving": body.volume(MOVING, lattice(MOVING, (3.5, 3.0, 3.0), turn(-5, 1), (12.0, -8.0, 5.0))),
    }
    for name, volume in volumes.items():
        write_nifti(folder / f"{name}.nii.gz", volume.array, volume.affine)
        labels = np.digitize(volume.array, [0.4, 1.0]).astype(np.int16)
        write_nifti(folder / f"{name}_labels.nii.gz", labels, volume.affine)
    points = np.random.default_rng(2).uniform(-20, 20, (12, 3))
    for name, places in (("fixed", points), ("moving", through(points))):
        lines = [f"{number},{x:.5f},{y:.5f},{z:.5f}" for number, (x, y, z) in enumerate(places)]
        (folder / f"{name}_points.csv").write_text("\n".join(["id,x,y,z", *lines]) + "\n")
    return folder


@pytest.fixture(scope="module")
def found(folder) -> Registration:
    return register(folder / "fixed.nii.gz", folder / "moving.nii.gz", preset="fast")


@pytest.fixture(scope="module")
def out(found, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "deeper"
    labels = {f"{name}_labels": nifti.load_labels(folder / f"{name}_labels.nii.gz") for name in ("fixed", "moving")}
    points = {f"{name}_points": folder / f"{name}_points.csv" for name in ("fixed", "moving")}
    others = [nifti.load_image(folder / "moving.nii.gz")]
    results.save(found, out, **labels, **points, also_apply=others, learn2reg=True)
    return out


def voxels(shape, count=200):
    return np.random.default_rng(0).uniform(0, 1, (count, 3)) * np.subtract(shape, 1)


def test_what_is_bright_is_compared_too(found):
    for volume in (found.fixed_working, found.moving_working):
        assert np.mean(volume.array >= volume.array.max()) < 1e-3 and volume.array.max() > 1


def test_the_map_is_close_to_the_true_one(out):
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["tre_mm"]["points"] == 12
    tre_mm, dice = metrics["tre_mm"], {when: part["mean"] for when, part in metrics["dice"].items()}
    assert tre_mm["after"] < 1.5 < 10 < tre_mm["before"] and tre_mm["after"] < tre_mm["affine"] < tre_mm["before"]
    assert dice["after"] > 0.9 > dice["before"] and dice["after"] > dice["affine"] > dice["before"]
    assert metrics["folding_percent"] == 0 and metrics["certificate"]["invertible"]
    sides_mm = np.sort(np.subtract(FIXED, 1) * (3.0, 3.0, 4.5))
    for stage in metrics["stages"]:
        found_mm = np.sort(np.multiply(stage["cell_mm"], np.subtract(stage["grid_size"], 3)))
        np.testing.assert_allclose(found_mm, sides_mm)
    assert metrics["correlation"]["after"] > metrics["correlation"]["affine"] > metrics["correlation"]["before"]


def test_the_folder_holds_what_it_should_and_nothing_half_written(out):
    images = "warped warped_moving_labels warped_moving"
    names = f"{images} displacement inverse_displacement learn2reg_displacement".split()
    expected = {f"{name}.nii.gz" for name in names} | {"transform.tfm", "spline.mat", "metrics.json", "report.html"}
    assert set(results.FILES) - expected == {"sigma.nii.gz"}
    expected |= {"fixed_points_in_moving.csv", "moving_points_in_fixed.csv"}
    assert {path.name for path in out.iterdir()} == expected
    assert (out / "report.html").read_text().count("data:image/png;base64") == 27


@pytest.mark.parametrize("name", ["warped", "warped_moving_labels", "displacement"])
def test_results_lie_on_the_lattice_of_the_fixed_file(out, folder, name):
    fixed, result = nib.load(folder / "fixed.nii.gz"), nib.load(out / f"{name}.nii.gz")
    assert result.shape[:3] == fixed.shape
    np.testing.assert_array_equal(result.affine, fixed.affine.astype(np.float32))


def test_simpleitk_maps_the_same_points_and_makes_the_same_image(out, folder, found):
    sitk = pytest.importorskip("SimpleITK")
    transform = sitk.ReadTransform(str(out / "transform.tfm"))
    points_mm = geometry.voxel_to_world(voxels(found.fixed.array.shape), found.fixed.affine)
    theirs = np.array([transform.TransformPoint(p) for p in (points_mm * itk.FLIP).tolist()]) * itk.FLIP
    np.testing.assert_allclose(found.map_points(points_mm), theirs, atol=1e-3)

    fixed, moving = (sitk.ReadImage(str(folder / f"{name}.nii.gz")) for name in ("fixed", "moving"))
    lowest = float(found.moving.array.min())
    warped = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, lowest)).T
    ours = np.asarray(nib.load(out / "warped.nii.gz").dataobj)
    # ITK ends an image at its voxel's edge too, but there may decide otherwise by rounding.
    assert np.mean(np.abs(ours - warped) > 1e-3 * np.ptp(ours)) < 1e-3


def test_the_dense_displacement_is_the_whole_map(out, found):
    vectors_mm, affine = itk_files.load_displacement(out / "displacement.nii.gz")
    index = np.random.default_rng(1).integers(0, vectors_mm.shape[:3], (100, 3))
    points_mm = geometry.voxel_to_world(index, affine)
    np.testing.assert_allclose(points_mm + vectors_mm[tuple(index.T)], found.map_points(points_mm), atol=1e-3)


def test_the_inverse_leads_back(out, found):
    mean_mm, largest_mm = found.inverse_errors_mm
    assert mean_mm < 0.1 and mean_mm < largest_mm
    vectors_mm, affine = itk_files.load_displacement(out / "inverse_displacement.nii.gz")
    assert vectors_mm.shape[:3] == found.inverse_shape
    sizes = found.moving.array.shape, found.inverse_shape
    corners_mm = [_corners_mm(size, each) for size, each in zip(sizes, (found.moving.affine, affine), strict=True)]
    np.testing.assert_allclose(*corners_mm, atol=1e-3)
    stored, image = (nib.load(path) for path in (out / "inverse_displacement.nii.gz", found.moving.path))
    assert nib.aff2axcodes(stored.affine) == nib.aff2axcodes(image.affine)
    # Points well inside, where nothing leads off either lattice.
    points_mm = np.random.default_rng(3).uniform(-15, 15, (100, 3))
    there = found.map_points(points_mm)
    np.testing.assert_allclose(found.map_points_back(there), points_mm, atol=1e-3)
    field = [itk_files.read(out / "inverse_displacement.nii.gz")[0]]
    assert np.linalg.norm(itk.apply(field, there) - points_mm, axis=1).mean() < 0.2


def test_points_without_a_way_back_are_told(found, folder, tmp_path, monkeypatch):
    lead_back = Registration.map_points_back
    points = {"fixed_points": None, "moving_points": folder / "moving_points.csv"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results.save(found, tmp_path, **points)
    monkeypatch.setattr(Registration, "map_points_back", lambda self, points_mm: lead_back(self, points_mm) + 1.0)
    with pytest.warns(UserWarning, match="moving_points.csv: to 12 of its 12 points the map takes none"):
        results.save(found, tmp_path, **points)


def _corners_mm(shape, affine):
    corners = np.array(list(np.ndindex(2, 2, 2))) * np.subtract(shape, 1)
    return np.array(sorted(np.round(geometry.voxel_to_world(corners, affine), 2).tolist()))


@pytest.mark.parametrize(
    ("shape", "spacing", "expected"),
    [
        ((35, 52, 34), (1.0, 1.0, 1.0), (69, 103, 67)),
        ((256, 216, 10), (1.4, 1.4, 10.0), (256, 216, 37)),  # slices are cut first, as far as there is room
        ((160, 200, 160), (1.0, 1.0, 1.0), (160, 200, 160)),
        ((20, 20, 1), (1.0, 1.0, 1.0), (39, 39, 1)),
    ],
)
def test_the_voxels_of_a_small_image_are_cut_for_its_inverse(found, shape, spacing, expected):
    moving = Volume(np.zeros(shape, np.float32), np.diag([*spacing, 1.0]), Path("moving.nii"))
    assert dataclasses.replace(found, moving=moving).inverse_shape == expected


def test_a_small_image_gets_its_inverse_exactly_where_the_map_is_steep_too(found):
    """At half voxels, against SciPy's linear interpolation of the map between half voxels."""
    image = Volume(np.zeros((24, 22, 20), np.float32), np.eye(4), Path("image.nii"))
    steep = dataclasses.replace(
        found,
        **dict.fromkeys(("fixed", "moving", "fixed_working", "moving_working"), image),
        matrix=np.eye(4),
        control_grid=np.random.default_rng(0).uniform(-1, 1, (7, 7, 7, 3)).astype(np.float32),
    )
    voxels = np.indices(steep.inverse_shape) / 2
    reached = voxels + np.moveaxis(steep.inverse_displacement_mm, -1, 0)
    finer = interpolate(jnp.asarray(steep.control_grid)[None], steep.inverse_shape, method="bspline")[0]
    displacement = [ndimage.map_coordinates(part, 2 * reached, order=1) for part in np.moveaxis(finer, -1, 0)]
    last = np.reshape(image.array.shape, (3, 1, 1, 1)) - 1
    inside = ((reached >= 0) & (reached <= last)).all(axis=0)
    assert inside.mean() > 0.8
    error = np.abs(reached + displacement - voxels)[:, inside]
    assert np.quantile(error, 0.999) < 1e-3 and error.max() < 5e-3


def test_written_points(out, folder, found):
    with (out / "fixed_points_in_moving.csv").open() as file:
        rows = [[float(row[axis]) for axis in "xyz"] for row in csv.DictReader(file)]
    points_mm = np.array(list(nifti.load_landmarks(folder / "fixed_points.csv").values()))
    np.testing.assert_allclose(rows, found.map_points(points_mm), atol=1e-5)


def test_labels_are_voted_for_and_none_is_invented(out, folder):
    warped, moving = (nib.load(path) for path in (out / "warped_moving_labels.nii.gz", folder / "moving_labels.nii.gz"))
    values = np.asarray(warped.dataobj)
    assert values.dtype.kind == "i" and set(np.unique(values)) <= set(np.unique(np.asarray(moving.dataobj)))


def test_outside_the_moving_image_is_its_minimum(found):
    part = Volume(found.moving.array[:14].copy(), found.moving.affine, found.moving.path)
    warped = found.warp(part)
    assert np.mean(warped == part.array.min()) > 0.2


def test_images_of_nibabel_arrays_and_files_are_the_same(folder, found):
    options = dict(preset="fast", affine=found.matrix)
    images = [nib.load(folder / f"{name}.nii.gz") for name in ("fixed", "moving")]
    arrays = [(image.get_fdata(), image.affine) for image in images]
    first = gridreg_jax.register(*images, grid=4, **options)
    second = gridreg_jax.register(*arrays, grid=np.int64(4), **options)
    np.testing.assert_allclose(first.control_grid, second.control_grid, atol=1e-5)


def test_a_given_affine(tmp_path, found):
    itk_files.write_mat(tmp_path / "affine.mat", found.transforms[0])
    np.testing.assert_allclose(given_affine(tmp_path / "affine.mat"), found.matrix, atol=1e-9)
    np.testing.assert_array_equal(given_affine("off"), np.eye(4))
    itk_files.write_tfm(tmp_path / "both.tfm", found.transforms)
    with pytest.raises(InputError, match="both.tfm: holds more than an affine"):
        given_affine(tmp_path / "both.tfm")
    with pytest.raises(InputError, match="'none': give auto, rigid, off, or a file"):
        given_affine("none")


@pytest.mark.parametrize("affine", [np.diag([1.0, 0, 1, 1]), np.eye(3), np.diag([1, 1, 1, 2.0]), np.eye(4) * np.nan])
def test_a_matrix_of_no_invertible_affine_map_is_refused(affine):
    with pytest.raises(InputError, match="affine: no 4 x 4 matrix of an affine map"):
        given_affine(affine)


@pytest.mark.parametrize(("option", "name"), [("preset", "fats"), ("similarity", "fats"), ("similarity", "ssim")])
def test_an_unknown_name_is_named(folder, option, name):
    with pytest.raises(InputError, match=f"{option}: '{name}' is not known; known are (?!.*ssim)"):
        register(folder / "fixed.nii.gz", folder / "moving.nii.gz", **{option: name})


def test_overlap_is_of_the_labels_that_both_images_hold_whatever_the_map_does_to_them(found):
    moving = np.zeros((8, 8, 8), np.int32)
    moving[1:3], moving[5, :2], moving[6:] = 1, 4, 9  # 9 is in the moving image alone
    fixed = np.where(moving == 9, 7, moving)  # and 7 in the fixed one
    far = nib.affines.from_matvec(np.eye(3), [30, 0, 0])
    registration = dataclasses.replace(found, fixed=Volume(fixed, np.eye(4), Path("fixed")), matrix=far)
    warped = np.where(moving == 4, 0, moving)  # 4 has vanished
    dice = results._overlaps(registration, fixed, Volume(moving, far, Path("moving")), warped)
    assert dice["before"] == {"mean": 0.0, "labels": {1: 0.0, 4: 0.0}}
    assert dice["affine"] == {"mean": 1.0, "labels": {1: 1.0, 4: 1.0}}
    assert dice["after"] == {"mean": 0.5, "labels": {1: 1.0, 4: 0.0}}
    none = results._overlaps(registration, fixed * (fixed == 7), Volume(moving, far, Path("moving")), warped)
    assert none == dict.fromkeys(("before", "affine", "after"), {"mean": None, "labels": {}})


@pytest.mark.parametrize("which", [0, 1])
def test_a_single_slice_and_slanted_axes_are_refused(found, which):
    pair, slanted = [found.fixed, found.moving], np.eye(4)
    slanted[0, 1] = 0.01
    slice_ = dataclasses.replace(pair[which], array=pair[which].array[:, :, 10:11])
    slanted = dataclasses.replace(pair[which], affine=pair[which].affine @ slanted)
    for bad, message in ((slice_, "at least [23] voxels an axis"), (slanted, "its axes are 0.[68][0-9] degrees off")):
        with pytest.raises(InputError, match=message):
            register(*pair[:which], bad, *pair[which + 1 :])


def test_a_volume_is_warped_from_what_register_takes_to_the_axes_of_the_fixed_file(out, folder, found):
    image = nib.load(folder / "moving.nii.gz")
    names = "warped", "warped_moving_labels"
    warped, labels = (np.asarray(nib.load(out / f"{name}.nii.gz").dataobj) for name in names)
    assert warped.shape != found.fixed.array.shape, "both axis orders are one: the test shows nothing"
    for source in (folder / "moving.nii.gz", image, (image.get_fdata(), image.affine), found.moving):
        np.testing.assert_allclose(found.warp(source), warped, atol=1e-6)
    np.testing.assert_array_equal(found.warp(folder / "moving_labels.nii.gz", labels=True), labels)


def test_the_correlation_is_of_what_both_images_show(found):
    """A moving image that shows a part of what the fixed one does, and one that shows nothing of it."""
    working = found.moving_working
    part = dataclasses.replace(working, array=working.array[: working.array.shape[0] // 2])
    correlation = results._compare(dataclasses.replace(found, moving_working=part))[1]["correlation"]
    assert correlation["after"] > 0.98
    far = dataclasses.replace(working, affine=nib.affines.from_matvec(np.eye(3), [999, 0, 0]) @ working.affine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        volumes, numbers = results._compare(dataclasses.replace(found, moving_working=far))
    assert set(numbers["correlation"].values()) == {None}
    assert all(np.isfinite(volume).all() for volume in volumes.values())


def test_what_is_undefined_is_none_and_uncertainty_lies_on_the_fixed_lattice(found, folder, tmp_path):
    working, far = found.fixed_working, nib.affines.from_matvec(np.eye(3), [999, 0, 0]) @ found.matrix
    places_mm = geometry.voxel_to_world(np.moveaxis(np.indices(working.array.shape), 0, -1), working.affine)
    direction = np.array([0.02, -0.01, 0.03])
    lost = dataclasses.replace(found, matrix=far, sigma_mm=(5 + places_mm @ direction).astype(np.float32))
    metrics = results.save(lost, tmp_path)
    assert metrics["inverse_error_mm"] == {"mean": None, "max": None}
    assert not re.search("NaN|Infinity", (tmp_path / "metrics.json").read_text())
    sigma, fixed = nib.load(tmp_path / "sigma.nii.gz"), nib.load(folder / "fixed.nii.gz")
    np.testing.assert_array_equal(sigma.affine, fixed.affine.astype(np.float32))
    places_mm = nib.affines.apply_affine(fixed.affine, np.moveaxis(np.indices(fixed.shape), 0, -1))
    np.testing.assert_allclose(sigma.get_fdata(), 5 + places_mm @ direction, atol=0.05)


def test_what_the_mask_leaves_out_does_not_count(folder, found):
    fixed = nifti.load_image(folder / "fixed.nii.gz")
    spoilt = fixed.array.copy()
    spoilt[:, :8] = spoilt[:, 8:16]  # shown twice
    mask = np.ones(FIXED, np.int32)
    mask[:, :8] = 0
    points_mm = geometry.voxel_to_world(voxels(FIXED) * [1, 0.5, 1] + [0, 13, 0], fixed.affine)
    mask = Volume(mask, fixed.affine, Path("mask"))
    register_it = functools.partial(register, moving=folder / "moving.nii.gz", preset="fast")
    errors = []
    for clean, options in ((found, {}), (register_it(fixed, mask=mask), {"mask": mask})):
        other = register_it(Volume(spoilt, fixed.affine, fixed.path), **options)
        errors.append(np.linalg.norm(other.map_points(points_mm) - clean.map_points(points_mm), axis=1).mean())
    assert errors[1] < 0.4 * errors[0]  # on coarser lattices its border is blurred


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((np.zeros((4, 4, 4)), np.eye(3)), "affine must be 4 x 4 numbers, voxel -> RAS mm, not float64.3, 3."),
        ((np.full((4, 4, 4), None), np.eye(4)), "voxels must be single real numbers, not object"),
    ],
)
def test_what_is_no_image_is_refused(folder, source, message):
    with pytest.raises(InputError, match=message):
        register(source, folder / "moving.nii.gz")


def test_arrays_may_have_types_that_nifti_has_not(folder, found):
    fixed = nifti.load_image(folder / "fixed.nii.gz")
    bright = fixed.array > np.median(fixed.array)
    expected = found.warp((bright.astype(np.int32), fixed.affine), labels=True)
    np.testing.assert_array_equal(found.warp((bright, fixed.affine), labels=True), expected)
    half = fixed.array.astype(np.float16)
    np.testing.assert_array_equal(
        found.warp((half, fixed.affine)), found.warp((half.astype(np.float32), fixed.affine))
    )


def test_a_name_that_is_no_text_is_written(found, tmp_path):
    odd = dataclasses.replace(found, moving=dataclasses.replace(found.moving, path=Path("b\udcfcd.nii.gz")))
    results.save(odd, tmp_path)
    assert "b?d" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_mask_of_what_the_moving_image_does_not_show_is_refused(folder):
    fixed, moving = (nifti.load_image(folder / f"{name}.nii.gz") for name in ("fixed", "moving"))
    mask = np.zeros(FIXED, np.int32)
    mask[:8] = 1
    half = np.eye(4)
    # Half a field of view along the first axis: what the mask leaves lies beyond the moving image.
    half[:3, 3] = -0.5 * FIXED[0] * fixed.affine[:3, 0]
    mask = Volume(mask, fixed.affine, Path("mask"))
    with pytest.raises(InputError, match="mask: of what the mask leaves .* shows 0 voxels, and at least 100"):
        register(fixed, moving, preset="fast", affine=half, mask=mask)


@pytest.mark.parametrize("late", ["warped.nii.gz", "displacement.nii.gz", "transform.tfm", "report.html"])
def test_a_write_that_fails_late_leaves_nothing(found, tmp_path, monkeypatch, late):
    def fail(path, content):
        if path.name.endswith(late):
            raise OSError(28, "No space left on device")
        return write[type(content)](path, content)

    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "warped.nii.gz").write_bytes(b"old")
    write = {bytes: Path.write_bytes, str: Path.write_text}
    monkeypatch.setattr(Path, "write_bytes", fail)
    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(InputError, match="cannot be written .No space left"):
        results.save(found, tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    with pytest.raises(InputError, match="cannot be written .No space left"):
        results.save(found, tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["warped.nii.gz"]
    assert (tmp_path / "there" / "warped.nii.gz").read_bytes() == b"old"


def test_a_folder_in_the_place_of_a_result_leaves_the_others_as_they_were(found, tmp_path):
    (tmp_path / "warped.nii.gz").mkdir()
    (tmp_path / "displacement.nii.gz").write_bytes(b"old")
    with pytest.raises(InputError, match="warped.nii.gz: a folder is in the place of a result"):
        results.save(found, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["displacement.nii.gz", "warped.nii.gz"]
    assert (tmp_path / "displacement.nii.gz").read_bytes() == b"old"


def test_what_cannot_be_written_is_named_where_it_would_be_in_the_end(tmp_path):
    with pytest.raises(InputError) as stopped, results.filling(tmp_path / "out") as folder:
        raise InputError(f"{folder / 'warped.nii.gz'}: cannot be written")
    assert str(stopped.value) == f"{tmp_path / 'out' / 'warped.nii.gz'}: cannot be written"


def test_points_are_rows_of_three(found):
    for maps in (found.map_points, found.map_points_back):
        assert maps([[1.0, 2.0, 3.0]]).shape == (1, 3)
        for wrong in ([1.0, 2.0, 3.0], [[1.0, 2.0]]):
            with pytest.raises(InputError, match=r"points are an array of shape \(P, 3\)"):
                maps(wrong)


def test_a_volume_that_the_map_does_not_reach_is_told(found):
    far = np.eye(4)
    far[0, 3] = 1e4
    away = dataclasses.replace(found.moving, affine=far @ found.moving.affine)
    with pytest.warns(UserWarning, match="the map leads nowhere into it"):
        found.on_fixed(away)


def test_two_volumes_of_one_name_are_refused(found, tmp_path):
    labels = Volume(np.ones((4, 4, 4), np.int32), np.eye(4), Path("labels/scan.nii.gz"))
    image = dataclasses.replace(found.moving, path=Path("images/scan.nii"))
    with pytest.raises(InputError, match="labels/scan.nii.gz and images/scan.nii would both .* warped_scan.nii.gz"):
        results.save(found, tmp_path / "out", moving_labels=labels, also_apply=[image])
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_no_folder_of_parts(found, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        results.save(found, tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_learn2reg_warps_by_its_field_as_we_do(folder, out):
    """Their code adds the field to the voxel indices of the files' arrays."""
    field = nib.load(out / "learn2reg_displacement.nii.gz").get_fdata()
    moving, warped = (nib.load(path).get_fdata() for path in (folder / "moving.nii.gz", out / "warped.nii.gz"))
    assert field.shape == (*warped.shape, 3)
    places = np.indices(warped.shape) + np.moveaxis(field, -1, 0)
    found = ndimage.map_coordinates(moving, places, order=1, cval=np.nan)
    inside = ~np.isnan(found)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(found[inside], warped[inside], atol=1e-3 * np.ptp(moving))
