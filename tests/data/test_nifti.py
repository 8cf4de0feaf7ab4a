"""Reading and writing NIfTI, against SimpleITK and nibabel; every bad file is refused by name."""

import gzip
import itertools
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from gridreg_jax.data import nifti
from gridreg_jax.errors import InputError

SHAPE = (5, 6, 7)


def write(path: Path, array, affine=None) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def ramp(shape=SHAPE, dtype=np.float32):
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


def oblique_affine(axes=(0, 1, 2), flips=(1, 1, 1)):
    """A slightly rotated, anisotropic affine whose array axes run along any world axes, in any direction."""
    angle = 0.2
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    directions = (rotation @ np.diag(flips))[:, list(axes)]
    return nib.affines.from_matvec(directions * [1.0, 1.5, 3.0], [11.0, -7.0, 5.0])


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (-1, -1, 1), (1, -1, -1), (-1, -1, -1)])
def test_every_orientation_comes_as_ras_with_world_positions_kept(tmp_path, axes, flips):
    sitk = pytest.importorskip("SimpleITK")
    path = write(tmp_path / "image.nii", ramp(), oblique_affine(axes, flips))
    volume = nifti.load_image(path)
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    reference = sitk.ReadImage(str(path))
    for voxel in itertools.product(*[(0, 1, size - 1) for size in volume.array.shape]):
        world = volume.affine @ [*voxel, 1]
        index = reference.TransformPhysicalPointToIndex((-world[0], -world[1], world[2]))
        assert volume.array[voxel] == reference[index]


@pytest.mark.parametrize("name", ["image.nii", "image.nii.gz", "image.hdr"])
def test_load_image_gives_scaled_float32(tmp_path, name):
    image = (nib.Nifti1Pair if name.endswith("hdr") else nib.Nifti1Image)(ramp(dtype=np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / name)
    volume = nifti.load_image(str(tmp_path / name))
    assert volume.array.dtype == np.float32 and volume.affine.dtype == np.float64
    assert volume.path == tmp_path / name
    np.testing.assert_allclose(volume.array, nib.load(tmp_path / name).get_fdata(), rtol=1e-6)
    assert volume.array.max() > 90  # The scale was there to be applied.


@pytest.mark.parametrize("extra", [(1,), (1, 1)])
def test_trailing_axes_of_size_one_are_dropped(tmp_path, extra):
    volume = nifti.load_image(write(tmp_path / "image.nii.gz", ramp().reshape(SHAPE + extra)))
    np.testing.assert_array_equal(volume.array, ramp())


def bad_image(array, affine=None):
    return lambda path: write(path, array, affine)


def with_value(*values):
    array = ramp()
    array.flat[: len(values)] = values
    return array


def truncated(path, keep=0.6):
    write(path, np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def damaged_inside(path):
    write(path, np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def with_sform(*diagonal):
    def make(path):
        image = nib.Nifti1Image(ramp(), None)
        image.header.set_sform(np.diag([*diagonal, 1.0]), code=1)
        nib.save(image, path)

    return make


def of_colours(path):
    write(path, np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]))


def of_no_voxels(path):
    header = nib.Nifti1Header()
    header["dim"][:4] = (3, 5, 0, 7)
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4)))


BAD_IMAGES = {
    "four dimensions": (bad_image(ramp((5, 6, 7, 2))), r"three-dimensional volume is needed.*\(5, 6, 7, 2\)"),
    "two dimensions": (bad_image(ramp((5, 6))), r"three-dimensional volume is needed.*\(5, 6\)"),
    "empty": (of_no_voxels, r"empty.*\(5, 0, 7\)"),
    "not finite": (bad_image(with_value(np.nan, np.inf, -np.inf)), "3 of 210 voxels are not finite"),
    "beyond float32": (bad_image(with_value(1.0).astype(np.float64) * 1e37), "not finite .*the range of float32"),
    "constant": (bad_image(np.full(SHAPE, 7, np.int16)), "every voxel is 7"),
    "colours": (of_colours, "single real numbers"),
    "truncated": (truncated, "cannot be read as NIfTI"),
    "truncated in the header": (lambda path: truncated(path, keep=0.05), "cannot be read as NIfTI"),
    "damaged": (damaged_inside, "cannot be read as NIfTI"),
    "text": (lambda path: path.write_text("not an image"), "cannot be read as NIfTI"),
    "no bytes": (lambda path: path.write_bytes(b""), "cannot be read as NIfTI"),
    "flat affine": (with_sform(1, 0, 1), "cannot be inverted"),
    "affine of NaN": (with_sform(1, np.nan, 1), "cannot be inverted"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "missing": (lambda path: None, "no such file"),
}


NOT_BAD_FOR_LABELS = ("constant", "beyond float32")


@pytest.mark.parametrize(
    ("load", "case"),
    [(nifti.load_image, case) for case in BAD_IMAGES]
    + [(nifti.load_labels, case) for case in BAD_IMAGES if case not in NOT_BAD_FOR_LABELS],
)
def test_bad_files_are_refused_by_name(tmp_path, load, case):
    make, message = BAD_IMAGES[case]
    path = tmp_path / "the_file.nii.gz"
    make(path)
    with pytest.raises(InputError, match=f"the_file.nii.gz: .*{message}") as caught:
        load(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_constant_image_and_one_without_a_place_are_taken_where_they_will_do(tmp_path):
    path = write(tmp_path / "image.nii", np.full(SHAPE, 7, np.int16))
    assert (nifti.load_image(path, constant=True).array == 7).all()
    nib.save(nib.Nifti1Image(ramp(), None), tmp_path / "nowhere.nii")
    for load in (nifti.load_image, nifti.load_labels):
        load(tmp_path / "nowhere.nii")
        with pytest.raises(InputError, match="nowhere.nii: its header has no affine"):
            load(tmp_path / "nowhere.nii", placed=True)


def in_two_places(path, apart_mm, codes=(4, 1)):
    image = nib.Nifti1Image(ramp(), None)
    image.set_sform(nib.affines.from_matvec(np.eye(3), [apart_mm, 0, 0]), codes[0])
    image.set_qform(np.eye(4), codes[1])
    nib.save(image, path)
    return path


def test_a_header_that_gives_two_places_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="the_file.nii: its sform and qform lie up to 15 mm apart: the sform counts"):
        volume = nifti.load_image(in_two_places(tmp_path / "the_file.nii", 15), placed=True)
    assert volume.affine[0, 3] == 15


@pytest.mark.parametrize(
    ("apart_mm", "codes", "quaternion"), [(0.3, (4, 1), 0), (15, (4, 0), 0), (15, (0, 1), 0), (15, (4, 1), 9)]
)
def test_rounding_and_a_single_form_that_counts_are_no_two_places(tmp_path, apart_mm, codes, quaternion):
    image = nib.load(in_two_places(tmp_path / "first.nii", apart_mm, codes))
    image.header["quatern_b"] = quaternion  # 9: of no rotation
    (tmp_path / "image.nii").write_bytes(image.to_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nifti.load_image(tmp_path / "image.nii", placed=True)


@pytest.mark.parametrize(("slant", "right"), [(0, True), (5e-4, True), (2e-3, False)])
def test_axes_at_right_angles_are_told_from_others(tmp_path, slant, right):
    affine = oblique_affine()
    affine[:3, :3] = affine[:3, :3] @ (np.eye(3) + slant * np.eye(3, k=1) * [0, 1, 0])
    volume = nifti.load_image(write(tmp_path / "the_file.nii", ramp(), affine))
    if right:
        nifti.check_right_angles(volume)
    else:
        with pytest.raises(InputError, match="the_file.nii: its axes are .* degrees off right angles"):
            nifti.check_right_angles(volume)


UNITS_MM = {"unknown": 1, "meter": 1000, "mm": 1, "micron": 0.001}


@pytest.mark.parametrize("time", ["unknown", "sec"])
@pytest.mark.parametrize("unit", UNITS_MM)
def test_lengths_are_mm_whatever_the_unit_of_the_header(tmp_path, unit, time):
    sitk = pytest.importorskip("SimpleITK")
    affine, unit_mm = oblique_affine(flips=(-1, -1, 1)), UNITS_MM[unit]
    image = nib.Nifti1Image(ramp(), affine * np.array([[1 / unit_mm]] * 3 + [[1]]))
    image.set_qform(image.affine, 1)
    image.header.set_xyzt_units(unit, time)
    nib.save(image, tmp_path / "image.nii.gz")
    reference = sitk.ReadImage(str(tmp_path / "image.nii.gz"))
    np.testing.assert_allclose(reference.GetSpacing(), [1, 1.5, 3], rtol=1e-6)
    for source in (tmp_path / "image.nii.gz", image):
        volume = nifti.load_image(source, placed=True)
        np.testing.assert_allclose(volume.stored_affine, affine, rtol=1e-6)
        for voxel in itertools.product(*[(0, size - 1) for size in SHAPE]):
            x, y, z, _ = volume.affine @ [*voxel, 1]
            assert volume.array[voxel] == reference[reference.TransformPhysicalPointToIndex((-x, -y, z))]
    nifti.save(tmp_path / "again.nii.gz", *nifti.as_stored(volume.array, volume))
    again = sitk.ReadImage(str(tmp_path / "again.nii.gz"))
    assert nib.load(tmp_path / "again.nii.gz").header.get_xyzt_units()[0] == "mm"
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(again, get)(), getattr(reference, get)(), rtol=1e-5, atol=1e-6)


def test_two_places_are_mm_apart_whatever_the_unit(tmp_path):
    image = nib.load(in_two_places(tmp_path / "first.nii", 15))
    image.header.set_xyzt_units("micron")
    (tmp_path / "the_file.nii").write_bytes(image.to_bytes())
    with pytest.warns(UserWarning, match="the_file.nii: its sform and qform lie up to 0.015 mm apart"):
        nifti.load_image(tmp_path / "the_file.nii", placed=True)


def test_labels_a_voxel_off_are_refused_however_small_the_voxels(tmp_path):
    like = nifti.load_image(write(tmp_path / "the_image.nii", ramp(), np.diag([5e-4, 5e-4, 5e-4, 1])))
    moved = nib.affines.from_matvec(np.diag([5e-4] * 3), [5e-4, 0, 0])
    with pytest.raises(InputError, match="the_labels.nii: its voxels lie up to 0.0005 mm from"):
        nifti.load_labels(write(tmp_path / "the_labels.nii", ramp(), moved), like=like)


def test_truncated_uncompressed_file_is_refused(tmp_path):
    truncated(tmp_path / "the_file.nii")
    with pytest.raises(InputError, match="the_file.nii: cannot be read"):
        nifti.load_image(tmp_path / "the_file.nii")


def test_another_format_is_refused(tmp_path):
    nib.save(nib.MGHImage(ramp(), np.eye(4)), tmp_path / "the_file.mgz")
    with pytest.raises(InputError, match="the_file.mgz: is MGHImage, not NIfTI"):
        nifti.load_image(tmp_path / "the_file.mgz")


def test_labels_are_rounded_to_int32(tmp_path):
    path = write(tmp_path / "labels.nii", with_value(1.0002, 1.9998, 3, 207))
    labels = nifti.load_labels(path)
    assert labels.array.dtype == np.int32
    assert labels.array.flat[:4].tolist() == [1, 2, 3, 207]


def test_constant_labels_are_allowed(tmp_path):
    assert (nifti.load_labels(write(tmp_path / "labels.nii", np.full(SHAPE, 7, np.int16))).array == 7).all()


@pytest.mark.parametrize("value", [1.5, 3e9])
def test_values_that_are_no_labels_are_refused(tmp_path, value):
    path = write(tmp_path / "the_labels.nii", with_value(1, value, 2).astype(np.float64))
    with pytest.raises(InputError, match=r"the_labels.nii: labels must be whole numbers.*: 1 voxels are not"):
        nifti.load_labels(path)


def test_labels_stored_in_another_axis_order_lie_on_the_lattice_of_their_image(tmp_path):
    image = nib.Nifti1Image(ramp(), oblique_affine())
    nib.save(image, tmp_path / "image.nii")
    ornt = nib.orientations.axcodes2ornt(("P", "I", "L"))
    nib.save(image.as_reoriented(ornt), tmp_path / "labels.nii")
    like = nifti.load_image(tmp_path / "image.nii")
    labels = nifti.load_labels(tmp_path / "labels.nii", like=like)
    np.testing.assert_array_equal(labels.array, like.array)


@pytest.mark.parametrize("change", ["shape", "affine"])
def test_labels_on_another_lattice_are_refused_with_both_names(tmp_path, change):
    like = nifti.load_image(write(tmp_path / "the_image.nii", ramp()))
    shape, affine = SHAPE, np.eye(4)
    if change == "shape":
        shape = (5, 6, 8)
    else:
        affine[0, 0] = 1.01
    path = write(tmp_path / "the_labels.nii", ramp(shape), affine)
    with pytest.raises(InputError, match="the_labels.nii.*the_image.nii"):
        nifti.load_labels(path, like=like)


def test_labels_within_the_rounding_of_a_header_are_accepted(tmp_path):
    like = nifti.load_image(write(tmp_path / "image.nii", ramp()))
    affine = np.eye(4)
    affine[:3, 3] = 4e-4
    nifti.load_labels(write(tmp_path / "labels.nii", ramp(), affine), like=like)


def test_landmarks_of_a_csv(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("id, x, y, z, name\n7, 1.5, -2, 3, left\n3, 0, 0, 1e1, right\n")
    landmarks = nifti.load_landmarks(path)
    assert {key: value.tolist() for key, value in landmarks.items()} == {7: [1.5, -2, 3], 3: [0, 0, 10]}


def test_landmarks_of_a_csv_without_ids_count_from_one(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("x,y,z\n1,2,3\n4,5,6\n")
    assert {key: value.tolist() for key, value in nifti.load_landmarks(path).items()} == {1: [1, 2, 3], 2: [4, 5, 6]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y\n1,2\n", "column 'z' is missing"),
        ("x,y,z\n1,two,3\n", "row 2.*must be numbers.*two"),
        ("x,y,z\n1,2,3\n1,,3\n", "row 3.*must be numbers"),
        ("x,y,z\n1,2,nan\n", "row 2.*finite"),
        ("id,x,y,z\na,1,2,3\n", "row 2.*whole number"),
        ("id,x,y,z\n1,1,2,3\n1,1,2,3\n", "row 3: id 1 is there twice"),
        ("x,y,z\n", "empty"),
        ("x,y,z,x\n1,2,3,4\n", "column 'x' is there 2 times"),
    ],
)
def test_bad_landmark_csv_is_refused(tmp_path, text, message):
    (tmp_path / "points.csv").write_text(text)
    with pytest.raises(InputError, match=f"points.csv: .*{message}"):
        nifti.load_landmarks(tmp_path / "points.csv")


def test_landmarks_in_a_file_of_another_name_are_told_theirs(tmp_path):
    (tmp_path / "points.fcsv").write_text("x,y,z\n1,2,3\n")
    with pytest.raises(InputError, match=r"points.fcsv: landmarks are read from \.csv .* or as blobs from \.nii"):
        nifti.load_landmarks(tmp_path / "points.fcsv")


def test_landmarks_of_blobs_are_centroids_in_world_mm(tmp_path):
    affine = oblique_affine(axes=(1, 0, 2), flips=(-1, 1, 1))
    array = np.zeros(SHAPE, np.uint8)
    array[1, 2, 3] = 5
    array[3:5, 4, 1:4] = 2
    landmarks = nifti.load_landmarks(write(tmp_path / "blobs.nii.gz", array, affine))
    assert sorted(landmarks) == [2, 5]
    np.testing.assert_allclose(landmarks[5], affine[:3] @ [1, 2, 3, 1], atol=1e-4)
    np.testing.assert_allclose(landmarks[2], affine[:3] @ [3.5, 4, 2, 1], atol=1e-4)


def test_blobs_without_a_landmark_are_refused(tmp_path):
    path = write(tmp_path / "blobs.nii.gz", np.zeros(SHAPE, np.uint8))
    with pytest.raises(InputError, match="blobs.nii.gz: there is no landmark"):
        nifti.load_landmarks(path)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (np.float32, np.float32),
        (np.float64, np.float32),
        (np.uint8, np.uint8),
        (np.int16, np.int16),
        (np.int32, np.int32),
        (np.int64, np.int32),
        (bool, np.uint8),
    ],
)
def test_save_keeps_values_type_and_affine(tmp_path, dtype, stored):
    affine = oblique_affine()
    path = tmp_path / "new" / "image.nii.gz"
    nifti.save(path, ramp(dtype=np.int64).astype(dtype), affine)
    image = nib.load(path)
    assert image.get_data_dtype() == stored
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), ramp(dtype=np.int64).astype(dtype))
    for form, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
        assert code == 1
        np.testing.assert_allclose(form, affine, atol=1e-5)


def test_saved_image_is_where_simpleitk_sees_it(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    affine = oblique_affine(flips=(-1, -1, 1))
    nifti.save(tmp_path / "image.nii", ramp(), affine)
    image = sitk.ReadImage(str(tmp_path / "image.nii"))
    point = np.array(image.TransformIndexToPhysicalPoint((1, 2, 3))) * [-1, -1, 1]
    np.testing.assert_allclose(point, affine[:3] @ [1, 2, 3, 1], atol=1e-4)
    assert image[1, 2, 3] == ramp()[1, 2, 3]


def test_save_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "image.nii"
    nifti.save(path, ramp(), np.eye(4))

    def fail(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(InputError, match="image.nii: cannot be written .*No space"):
        nifti.save(path, 2 * ramp(), np.eye(4))
    assert list(tmp_path.iterdir()) == [path]
    np.testing.assert_array_equal(nifti.load_image(path).array, ramp())


def test_save_refuses_what_it_cannot_store(tmp_path):
    with pytest.raises(InputError, match="image.png: .*nii"):
        nifti.save(tmp_path / "image.png", ramp(), np.eye(4))
    with pytest.raises(InputError, match="image.nii: integers beyond 32 bits"):
        nifti.save(tmp_path / "image.nii", ramp(dtype=np.int64) + 2**40, np.eye(4))
    assert not list(tmp_path.iterdir())


def test_shapes_are_named_as_the_files_have_them(tmp_path):
    nifti.save(tmp_path / "image.nii", ramp(), np.eye(4))
    stored = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])  # axes along A, S, R
    nifti.save(tmp_path / "labels.nii", np.ones((3, 5, 7), np.int16), stored)
    with pytest.raises(InputError, match=r"labels.nii: its shape \(3, 5, 7\) is not "):
        nifti.load_labels(tmp_path / "labels.nii", like=nifti.load_image(tmp_path / "image.nii"))
