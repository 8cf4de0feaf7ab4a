"""`gridreg convert` and `apply` against SimpleITK: what they write is the same map, or leads back to its beginning."""

import re
import warnings

import nibabel as nib
import numpy as np
import pytest

from gridreg_jax import geometry
from gridreg_jax.cli import main
from gridreg_jax.data import nifti
from gridreg_jax.errors import InputError
from gridreg_jax.export import inverse, itk, itk_files

sitk = pytest.importorskip("SimpleITK")

SHAPE = (20, 17, 15)
TURN = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])
AFFINES = {
    "oblique": nib.affines.from_matvec(TURN * [1.1, 0.9, 2.5], [-20.0, 12.0, 7.0]),
    "flipped": nib.affines.from_matvec(TURN @ np.diag([-1.2, -1.0, 1.5]), [30.0, 5.0, -9.0]),
    "permuted": nib.affines.from_matvec(TURN[:, [2, 0, 1]] * [2.0, 0.8, 1.0], [3.0, -40.0, 11.0]),
}
MATRIX = nib.affines.from_matvec([[1.1, -0.1, 0.0], [0.12, 0.9, 0.05], [0.0, -0.1, 1.05]], [2.0, -1.0, 1.5])
EULER = itk.ItkTransform(
    "Euler3DTransform_double_3_3", np.array([0.1, -0.2, 0.3, 4.0, 5.0, -6.0]), np.array([9.0, -8.0, 7.0])
)
POINTS_MM = np.random.default_rng(0).uniform(-60, 60, (300, 3))


@pytest.fixture(autouse=True)
def _format_of_warnings(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # `main` sets its own


def spline(affine, seed=0, scale=1.0):
    return itk.bspline_transform(scale * np.random.default_rng(seed).normal(size=(6, 5, 6, 3)), SHAPE, affine)


def field():
    values = np.random.default_rng(1).normal(size=(9, 8, 7, 3)).astype(np.float32) / 4 + 1
    return itk.dense_field(values, AFFINES["oblique"] @ np.diag([2.0, 2, 2, 1]))


TRANSFORMS = {
    "composite": [itk.affine_transform(MATRIX), spline(AFFINES["oblique"]), EULER],
    "spline": [spline(AFFINES["oblique"])],
    "field": [field()],
    "affine": [itk.affine_transform(MATRIX), EULER, itk.affine_transform(AFFINES["oblique"])],
}


def by_sitk(transform, points_mm):
    return np.array([transform.TransformPoint(point) for point in (points_mm * itk.FLIP).tolist()]) * itk.FLIP


def read_by_sitk(path):
    if path.name.endswith((".nii", ".nii.gz")):
        return sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
    return sitk.ReadTransform(str(path))


def convert(folder, transforms, out, *options):
    """Writes the transforms as `map.tfm`, converts it, and gives SimpleITK's reading of it and of the result."""
    if out.endswith("h5"):
        pytest.importorskip("h5py")
    itk_files.write_tfm(folder / "map.tfm", transforms)
    main(["convert", str(folder / "map.tfm"), "--out", str(folder / out), *map(str, options)])
    return read_by_sitk(folder / "map.tfm"), read_by_sitk(folder / out)


def write_reference(folder, affine, shape=SHAPE):
    nifti.save(folder / "reference.nii.gz", np.zeros(shape, np.float32), affine)
    return folder / "reference.nii.gz"


def voxels_mm(shape, affine, border=0):
    axes = [np.arange(border, n - border) for n in shape]
    return geometry.voxel_to_world(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3), affine)


WRITTEN = [(name, suffix) for name in TRANSFORMS for suffix in (".tfm", ".txt", ".mat", ".h5", ".hdf5")]
WRITTEN.remove(("composite", ".mat"))  # refused


@pytest.mark.parametrize(("name", "suffix"), WRITTEN)
def test_every_format_holds_the_same_map(tmp_path, name, suffix):
    points_mm = np.concatenate([POINTS_MM, voxels_mm(SHAPE, AFFINES["oblique"])])
    before, after = convert(tmp_path, TRANSFORMS[name], f"again{suffix}")
    expected = by_sitk(before, points_mm)
    assert np.abs(expected - points_mm).max() > 1
    np.testing.assert_allclose(by_sitk(after, points_mm), expected, rtol=0, atol=1e-9)
    if suffix != ".mat":
        ours = (itk_files.read(tmp_path / file) for file in ("map.tfm", f"again{suffix}"))
        for read, again in zip(*ours, strict=True):
            np.testing.assert_array_equal(again.parameters, read.parameters)
            np.testing.assert_array_equal(again.fixed_parameters, read.fixed_parameters)


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_a_dense_field_is_the_map_at_the_voxels_of_the_reference(tmp_path, affine):
    reference = write_reference(tmp_path, affine)
    before, after = convert(tmp_path, TRANSFORMS["composite"], "again.nii.gz", "--reference", reference)
    points_mm = voxels_mm(SHAPE, affine, border=1)
    np.testing.assert_allclose(by_sitk(after, points_mm), by_sitk(before, points_mm), rtol=0, atol=2e-5)
    np.testing.assert_allclose(nib.load(tmp_path / "again.nii.gz").affine, affine, atol=1e-5)
    # A field read from NIfTI is written as it is.
    main(["convert", str(tmp_path / "again.nii.gz"), "--out", str(tmp_path / "field.tfm")])
    np.testing.assert_allclose(
        by_sitk(read_by_sitk(tmp_path / "field.tfm"), points_mm), by_sitk(after, points_mm), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("suffix", [".tfm", ".mat", ".h5", ".nii.gz"])
def test_the_inverse_of_an_affine_map_is_exact(tmp_path, suffix):
    affine = AFFINES["permuted"]
    options = ["--reference", write_reference(tmp_path, affine)] if suffix == ".nii.gz" else []
    before, after = convert(tmp_path, TRANSFORMS["affine"], f"back{suffix}", "--inverse", *options)
    points_mm = voxels_mm(SHAPE, affine, border=1)
    found = by_sitk(before, by_sitk(after, points_mm))
    np.testing.assert_allclose(found, points_mm, rtol=0, atol=1e-4 if options else 1e-9)  # float32 or not


@pytest.mark.parametrize("suffix", [".tfm", ".mat", ".h5", ".nii.gz"])
@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_the_inverse_leads_back_within_the_stated_error(tmp_path, capsys, affine, suffix):
    shape = (22, 16, 18)
    lattice = MATRIX @ affine @ np.diag([0.9, 1.1, 0.8, 1])  # turned against the grid, and for the most part on it
    transforms = [itk.affine_transform(MATRIX), spline(affine)]
    options = ["--inverse", "--reference", write_reference(tmp_path, nearest_right_angles(lattice), shape)]
    before, after = convert(tmp_path, transforms, f"back{suffix}", *options)
    told = re.search(r"error (\S+) mm on average, (\S+) mm at most, at (\d+) of (\d+) voxels", capsys.readouterr().out)
    mean_mm, max_mm, reached, voxels = map(float, told.groups())
    assert mean_mm <= max_mm <= inverse.TOLERANCE_MM and 0.7 * voxels < reached <= voxels == np.prod(shape)
    points_mm = voxels_mm(shape, nearest_right_angles(lattice), border=4)
    back = by_sitk(after, points_mm)
    assert np.abs(back - geometry.voxel_to_world(points_mm, np.linalg.inv(MATRIX))).max() > 0.5
    error = np.linalg.norm(by_sitk(before, back) - points_mm, axis=1)
    assert error.max() <= 1.06 * max_mm + (1e-5 if suffix == ".nii.gz" else 1e-9)  # as told, with two digits


def nearest_right_angles(affine):
    """The affine with its axes at right angles, of the same lengths."""
    spacing = geometry.spacing(affine)
    u, _, v = np.linalg.svd(affine[:3, :3] / spacing)
    return nib.affines.from_matvec(u @ v * spacing, affine[:3, 3])


def test_where_a_displacement_ends_at_its_border(tmp_path):
    # By two voxels along x in a box of 8 x 6 x 6, on a lattice that reaches 4 voxels farther.
    affine, shape = AFFINES["oblique"], (16, 14, 14)
    inner = affine @ nib.affines.from_matvec(np.eye(3), [4, 4, 4])
    transform = itk.dense_field(np.broadcast_to(affine[:3, :3] @ [2.0, 0, 0], (8, 6, 6, 3)), inner)
    back, errors = inverse.invert([transform], shape, affine)
    column, all_voxels = 6 * 6, 16 * 14 * 14
    assert errors.missed == 2 * column  # what has left, and nothing came to
    assert errors.missed_mm == pytest.approx(2 * geometry.spacing(affine)[0])
    assert errors.doubled == 2 * column  # what came there, beside what is there
    assert errors.outside == all_voxels - 10 * column
    assert errors.max_mm < 1e-9 and errors.folds == 0 and errors.probes > 50
    assert [line[: line.index(" voxels")] for line in errors.warnings()] == [f"to 72 of {all_voxels}"] * 2
    itk_files.write_tfm(tmp_path / "map.tfm", [transform])
    itk_files.write_tfm(tmp_path / "back.tfm", [back])
    points_mm = voxels_mm(shape, affine)
    found = by_sitk(read_by_sitk(tmp_path / "map.tfm"), by_sitk(read_by_sitk(tmp_path / "back.tfm"), points_mm))
    assert np.count_nonzero(np.linalg.norm(found - points_mm, axis=1) > 1e-6) == errors.missed


def test_what_folds_or_is_not_reached_is_told(tmp_path, capsys):
    affine = AFFINES["oblique"]
    options = ["--inverse", "--reference", write_reference(tmp_path, affine)]
    convert(tmp_path, [spline(affine, scale=4.0)], "back.tfm", *options)
    missed, *_, folds = capsys.readouterr().err.splitlines()
    assert re.match(r"warning: to \d+ of 5100 voxels no point was found that comes within 0.01 mm, by up to", missed)
    assert re.match(r"warning: the transform folds at \d+ of \d+ places of its domain, .*: several points come", folds)


def test_points_go_back_through_several_grids():
    affine = AFFINES["oblique"]
    bent = itk.bspline_transform(0.3 * np.random.default_rng(2).normal(size=(5, 5, 5, 3)), SHAPE, MATRIX @ affine)
    transforms = [bent, itk.affine_transform(MATRIX), field(), EULER]
    inside_mm = voxels_mm(SHAPE, affine, border=4)
    points_mm = geometry.voxel_to_world(inside_mm, np.linalg.inv(itk.affine_matrix([EULER])))
    there = itk.apply(transforms, points_mm)
    assert np.linalg.norm(there - itk.apply(transforms[1:2], inside_mm), axis=1).min() > 0.5
    np.testing.assert_allclose(inverse.points_back(transforms, there), points_mm, rtol=0, atol=1e-5)


def test_points_go_back_where_space_is_stretched_threefold():
    # Steps of a fixed-point iteration grow there.
    x = np.linspace(-1, 1, 13)[:, None, None, None] * [1.0, 0, 0]
    control_grid = np.broadcast_to(6 * np.tanh(3 * x), (13, 5, 5, 3))
    transforms = [itk.bspline_transform(control_grid, (20, 20, 20), np.eye(4))]
    points_mm = np.random.default_rng(4).uniform(2, 17, (300, 3))
    there = itk.apply(transforms, points_mm)
    np.testing.assert_allclose(inverse.points_back(transforms, there), points_mm, rtol=0, atol=1e-5)


def test_few_points_are_lost_where_it_all_but_folds():
    control_grid = 5 * np.random.default_rng(1).normal(size=(6, 6, 6, 3))
    transforms = [itk.bspline_transform(control_grid, (20, 20, 20), np.eye(4))]
    there = itk.apply(transforms, np.random.default_rng(9).uniform(3, 16, (4000, 3)))
    error = np.linalg.norm(itk.apply(transforms, inverse.points_back(transforms, there)) - there, axis=1)
    assert np.mean(error > 1e-5) < 0.035


def test_one_lattice_of_a_single_slice_and_several_slabs(monkeypatch):
    transforms = [spline(AFFINES["oblique"])]
    lattice = AFFINES["oblique"] @ nib.affines.from_matvec(np.eye(3), [0, 0, 7])
    whole, errors = inverse.invert(transforms, (20, 17, 1), lattice)
    monkeypatch.setattr(inverse, "POINTS", 40)
    monkeypatch.setattr(inverse, "ITERATIONS", 4)  # the coarse lattice has brought it near
    parts, _ = inverse.invert(transforms, (20, 17, 1), lattice)
    np.testing.assert_allclose(parts.parameters, whole.parameters, rtol=0, atol=2e-3)
    assert errors.missed < 100 and errors.max_mm < 0.002


def test_no_mat_holds_a_composite_with_a_grid(tmp_path):
    with pytest.raises(InputError, match="again.mat: a .mat file holds one .* as .tfm, .txt or .h5"):
        itk_files.write(tmp_path / "again.mat", TRANSFORMS["composite"])
    with pytest.raises(InputError, match="no transform"):
        itk_files.write(tmp_path / "again.mat", [])
    assert not list(tmp_path.iterdir())


def test_points_are_written_as_csv_only(tmp_path, capsys):
    itk_files.write_tfm(tmp_path / "map.tfm", [itk.affine_transform(MATRIX)])
    (tmp_path / "points.csv").write_text("id,x,y,z\n4,10,11,12\n")
    command = ["apply", "--transform", str(tmp_path / "map.tfm"), "--points", str(tmp_path / "points.csv"), "--out"]
    with pytest.raises(SystemExit, match="2"):
        main([*command, str(tmp_path / "out.nii.gz")])
    assert re.fullmatch(r"\S*error: \S*out.nii.gz: points are written as \.csv\n", capsys.readouterr().err)
    assert not (tmp_path / "out.nii.gz").exists()
    main([*command, str(tmp_path / "out.CSV")])
    np.testing.assert_allclose(nifti.load_landmarks(tmp_path / "out.CSV")[4], MATRIX[:3] @ [10, 11, 12, 1], atol=1e-6)


REFERENCES = {
    "not finite": np.full(SHAPE, np.nan, np.float32),
    "colours": np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]),
    "complex": np.zeros(SHAPE, np.complex64),
    "a series": np.zeros((*SHAPE, 3), np.float32),
    "vectors": np.zeros((*SHAPE, 1, 3), np.float32),
}


@pytest.mark.parametrize("array", REFERENCES.values(), ids=REFERENCES)
def test_of_a_reference_only_the_lattice_counts(tmp_path, array):
    affine = AFFINES["oblique"] @ nib.affines.from_matvec(np.diag([-1, 1, 1]), [SHAPE[0] - 1, 0, 0])
    itk_files.write_tfm(tmp_path / "map.tfm", TRANSFORMS["spline"])
    nifti.save(tmp_path / "image.nii", np.random.default_rng(5).normal(size=SHAPE), AFFINES["oblique"])
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, 1)
    nib.save(image, tmp_path / "other.nii.gz")
    for command in ("apply --image image.nii --transform map.tfm", "convert map.tfm"):
        command = [str(tmp_path / word) if "." in word else word for word in command.split()]
        for reference, out in ((write_reference(tmp_path, affine), "expected"), (tmp_path / "other.nii.gz", "found")):
            main([*command, "--reference", str(reference), "--out", str(tmp_path / f"{out}.nii.gz")])
        expected, found = (nib.load(tmp_path / f"{name}.nii.gz") for name in ("expected", "found"))
        assert expected.get_fdata().std() > 0.2
        np.testing.assert_array_equal(found.get_fdata(), expected.get_fdata())
        np.testing.assert_allclose(found.affine, affine, atol=1e-5)


@pytest.mark.parametrize(("cores", "threads"), [(3, 3), (100, 8)])
def test_an_inverse_is_sought_by_the_cores_there_are_but_not_by_very_many(monkeypatch, cores, threads):
    asked, pool = [], inverse.ThreadPoolExecutor
    monkeypatch.setattr(inverse, "cores", lambda: cores)
    monkeypatch.setattr(inverse, "ThreadPoolExecutor", lambda count: asked.append(count) or pool(count))
    inverse.invert([spline(np.eye(4))], (3, 4, 2), np.eye(4))
    assert asked == [threads]
