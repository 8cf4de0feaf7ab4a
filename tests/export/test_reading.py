"""Files of transforms: ITK's affine maps against SimpleITK, what is refused, and what `inspect` says of them."""

import re

import nibabel as nib
import numpy as np
import pytest

from gridreg_jax.data import nifti
from gridreg_jax.errors import InputError
from gridreg_jax.export import itk, itk_files
from gridreg_jax.registration.inspection import inspect
from gridreg_jax.registration.register import given_affine
from gridreg_jax.transforms.certificate import certify, uniform_weights

sitk = pytest.importorskip("SimpleITK")

POINTS_MM = np.random.default_rng(0).uniform(-120, 120, (200, 3))
CENTER = [10.0, 20.0, -30.0]
# A map of each kind: its parameters, random, or those given. Half a turn is where ITK shortens a versor.
MAPS = {
    **{kind: (f"{kind}_double_3_3", None, CENTER) for kind in itk.AFFINES},
    "identity": ("IdentityTransform_double_3_3", [], []),
    "translation": ("TranslationTransform_double_3_3", [1, -2, 3], []),
    "Euler, x y": ("Euler3DTransform_double_3_3", None, [*CENTER, 0]),
    "Euler, z y x": ("Euler3DTransform_double_3_3", None, [*CENTER, 1]),
    "half a turn": ("VersorRigid3DTransform_double_3_3", [0.6, 0, 0.8, 1, 2, 3], CENTER),
    "a long quaternion": ("QuaternionRigidTransform_double_3_3", [0.1, 0.2, -0.3, 1.5, 1, 2, 3], CENTER),
    "a reflection": ("ScaleTransform_double_3_3", [-1, 1, 2], CENTER),
}


def make(name):
    kind, values, fixed = MAPS[name]
    if values is None:
        values = np.random.default_rng(1).uniform(0.1, 0.5, itk.AFFINES[kind.split("_")[0]])
        # What is a scale, or on the diagonal, is about 1.
        values[[0, 4, 8] if values.size == 12 else slice(0 if kind.startswith("ScaleTransform") else 6, 9)] += 1
    return itk.ItkTransform(kind, np.array(values, np.float64), np.array(fixed, np.float64))


def by_sitk(transform, points_mm):
    return np.array([transform.TransformPoint(point) for point in (points_mm * itk.FLIP).tolist()]) * itk.FLIP


def written_by_sitk(path, transforms):
    """Lets SimpleITK read our text of the transforms, and write what it understood; gives that."""
    itk_files.write_tfm(path.with_name("ours.tfm"), transforms)
    reference = sitk.ReadTransform(str(path.with_name("ours.tfm")))
    if path.suffix == ".h5":
        pytest.importorskip("h5py")
    if path.suffix == ".mat" and isinstance(reference, sitk.CompositeTransform):
        # SimpleITK takes one of the names for a composite, which no .mat can hold.
        itk_files.write_mat(path, *transforms)
    else:
        sitk.WriteTransform(reference, str(path))
    return reference


@pytest.mark.parametrize("suffix", [".tfm", ".mat", ".h5"])
@pytest.mark.parametrize("name", MAPS)
def test_an_affine_map_of_every_kind_is_that_of_simpleitk(tmp_path, name, suffix):
    reference = written_by_sitk(tmp_path / f"map{suffix}", [make(name)])
    (stored,) = itk_files.read(tmp_path / f"map{suffix}")
    assert (stored.type, stored.stored) == (itk.AFFINE, MAPS[name][0])
    expected = by_sitk(reference, POINTS_MM)
    np.testing.assert_allclose(itk.apply([stored], POINTS_MM), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(itk.apply([make(name)], POINTS_MM), expected, rtol=0, atol=1e-9)
    matrix = given_affine(tmp_path / f"map{suffix}")
    np.testing.assert_allclose(nib.affines.apply_affine(matrix, POINTS_MM), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("suffix", [".tfm", ".h5"])
def test_a_composite_of_them_all(tmp_path, suffix):
    reference = written_by_sitk(tmp_path / f"map{suffix}", [make(name) for name in MAPS])
    stored = itk_files.read(tmp_path / f"map{suffix}")
    assert len(stored) == len(MAPS)
    expected = by_sitk(reference, POINTS_MM)
    assert np.abs(expected - POINTS_MM).max() > 1
    np.testing.assert_allclose(itk.apply(stored, POINTS_MM), expected, rtol=0, atol=1e-9)
    matrix = given_affine(tmp_path / f"map{suffix}")
    np.testing.assert_allclose(nib.affines.apply_affine(matrix, POINTS_MM), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MAPS)
def test_what_was_read_can_be_written(tmp_path, name):
    itk_files.write_tfm(tmp_path / "map.tfm", [make(name)])
    stored = itk_files.read(tmp_path / "map.tfm")
    itk_files.write_tfm(tmp_path / "again.tfm", stored)
    found = by_sitk(sitk.ReadTransform(str(tmp_path / "again.tfm")), POINTS_MM)
    np.testing.assert_allclose(found, itk.apply([make(name)], POINTS_MM), rtol=0, atol=1e-9)


AFFINE = ("AffineTransform_double_3_3", [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0])
GRID = [4, 4, 4, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1]
REFUSED = {
    "no transform": ([], "holds no transform"),
    "an empty composite": ([("CompositeTransform_double_3_3", None, None)], "holds no transform"),
    "two dimensions": (
        [("AffineTransform_double_2_2", [1, 0, 0, 1, 0, 0], [0, 0])],
        "AffineTransform_double_2_2 is not understood: AffineTransform_double_3_3 is",
    ),
    "an angle": ([("Euler2DTransform_double_2_2", [0.1, 0, 0], [0, 0])], "not understood: the known ones are Affine"),
    "a linear spline": ([("BSplineTransform_double_3_3_1", [0] * 192, GRID)], "BSplineTransform_double_3_3 is.*cubic"),
    "parameters missing": ([("Euler3DTransform_double_3_3", [0] * 5, [0] * 3)], "6 parameters and 3 or 4 .* not 5 and"),
    "no centre": ([(*AFFINE[:2], [])], "12 parameters and 3 fixed ones, not 12 and 0"),
    "a cut spline": ([AFFINE, ("BSplineTransform_double_3_3", [0] * 190, GRID)], "a grid point, 192 .*, not 190"),
    "a cut grid": ([("BSplineTransform_double_3_3", [0] * 192, GRID[:9])], "18 fixed parameters, not 9"),
    "half a point": ([("DisplacementFieldTransform_double_3_3", [0] * 24, [2, 2.5, 2, *GRID[3:]])], "whole numbers"),
    "no point": ([("DisplacementFieldTransform_double_3_3", [], [0, 0, 0, *GRID[3:]])], "at least 1 an axis"),
    "a value not finite": ([(AFFINE[0], [float("nan"), *AFFINE[1][1:]], AFFINE[2])], "not finite"),
    "a centre not finite": ([(*AFFINE[:2], [0, float("inf"), 0])], "not finite"),
    "a spline not finite": ([("BSplineTransform_double_3_3", [0] * 191 + [float("nan")], GRID)], "not finite"),
    "a singular matrix": ([(AFFINE[0], [*range(1, 10), 0, 0, 0], AFFINE[2])], "cannot be inverted"),
    "a scale of 0": ([("ScaleTransform_double_3_3", [1, 0, 1], [0, 0, 0])], "cannot be inverted"),
    "no rotation": ([("QuaternionRigidTransform_double_3_3", [0] * 7, [0, 0, 0])], "cannot be inverted"),
    "no direction": ([("BSplineTransform_double_3_3", [0] * 192, GRID[:9] + [0] * 9)], "direction that can be"),
    "no spacing": ([("BSplineTransform_double_3_3", [0] * 192, [*GRID[:6], 1, 0, *GRID[8:]])], "spacing above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_map_is_refused_in_one_line(tmp_path, case):
    transforms, message = REFUSED[case]
    lines = [itk_files.TFM_HEADER]
    for kind, values, fixed in transforms:
        lines.append(f"Transform: {kind}")
        if values is not None:
            lines.append(f"Parameters: {' '.join(map(str, values))}")
            lines.append(f"FixedParameters: {' '.join(map(str, fixed))}")
    path = tmp_path / "map.tfm"
    path.write_text("\n".join(lines) + "\n")
    # Before `inspect` says anything.
    for reader in (itk_files.read, given_affine, lambda path: next(inspect(path))):
        with pytest.raises(InputError, match=f"map.tfm: .*{message}") as refused:
            reader(path)
        assert "\n" not in str(refused.value)


def test_a_composite_as_mat_is_refused(tmp_path):
    sitk.WriteTransform(sitk.CompositeTransform([sitk.Euler3DTransform()] * 2), str(tmp_path / "map.mat"))
    with pytest.raises(InputError, match="map.mat: a .mat file does not say .*: write it as .tfm or .h5"):
        itk_files.read(tmp_path / "map.mat")


def test_the_misspelt_names_of_older_files_are_read(tmp_path):
    h5py, path = pytest.importorskip("h5py"), tmp_path / "map.h5"
    written_by_sitk(path, [make("Euler3DTransform"), make("translation")])
    expected = itk.apply(itk_files.read(path), POINTS_MM)
    with h5py.File(path, "a") as file:
        for group in (file["TransformGroup/1"], file["TransformGroup/2"]):
            for name in ("Parameters", "FixedParameters"):
                group.move(f"Transform{name}", f"Tranform{name}")
    np.testing.assert_allclose(by_sitk(sitk.ReadTransform(str(path)), POINTS_MM), expected, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(itk.apply(itk_files.read(path), POINTS_MM), expected)


def test_a_displacement_that_is_not_finite_is_refused(tmp_path):
    itk_files.save_displacement(tmp_path / "field.nii", np.full((3, 3, 3, 3), np.nan, np.float32), np.eye(4))
    with pytest.raises(InputError, match="field.nii: .*not finite"):
        itk_files.read(tmp_path / "field.nii")


def test_single_precision_in_the_name_is_no_other_map(tmp_path):
    path = tmp_path / "map.tfm"
    spline = itk.bspline_transform(np.random.default_rng(2).normal(size=(4, 5, 6, 3)), (9, 9, 9), np.eye(4))
    itk_files.write_tfm(path, [make("Euler3DTransform"), spline])
    path.write_text(path.read_text().replace("_double_", "_float_"))
    stored = itk_files.read(path)
    assert [transform.type for transform in stored] == [itk.AFFINE, itk.BSPLINE]
    expected = itk.apply([make("Euler3DTransform"), spline], POINTS_MM)
    np.testing.assert_array_equal(itk.apply(stored, POINTS_MM), expected)


def test_inspect_names_a_map_as_its_file_does(tmp_path):
    itk_files.write_tfm(tmp_path / "map.tfm", [make("Similarity3DTransform"), make("translation")])
    _, *lines = inspect(tmp_path / "map.tfm")
    scale = make("Similarity3DTransform").parameters[6]
    assert lines == [
        "Similarity3DTransform: acts everywhere",
        f"  determinant {scale**3:.4g}",
        "TranslationTransform: acts everywhere",
        "  determinant 1",
    ]


SHAPE = (31, 37, 29)
LATTICES = {
    "straight": np.diag([1.2, 0.9, 2.0, 1.0]),
    "sheared": nib.affines.from_matvec([[1.0, 0.5, 0.0], [0.0, 1.0, 0.2], [0.4, 0.0, 1.5]], [5.0, -6.0, 7.0]),
}


def steep_spline(where, cells=-2.5):
    """A control grid (voxels) whose uniform coefficient `where` along x is so many cells off: with -2.5 it folds in the
    cell before that, and nowhere else."""
    coefficients = np.zeros((7, 6, 5, 3))
    coefficients[where, ..., 0] = cells * (SHAPE[0] - 1) / 4
    return np.tensordot(np.linalg.inv(uniform_weights(7)), coefficients, 1)


def saved(tmp_path, control_grid, affine):
    """The spline, rounded in another way, and an image of its lattice."""
    spline = itk.bspline_transform(control_grid, SHAPE, affine)
    spline.parameters[:] *= 1 + 1e-15 * np.random.default_rng(3).normal(size=spline.parameters.size)
    itk_files.write_tfm(tmp_path / "map.tfm", [spline])
    nifti.save(tmp_path / "image.nii", np.indices(SHAPE, np.float32)[0], affine)
    return tmp_path / "map.tfm", tmp_path / "image.nii"


@pytest.mark.filterwarnings("ignore:.*sform and qform")  # no qform is sheared
@pytest.mark.parametrize("affine", LATTICES.values(), ids=LATTICES)
def test_inspect_proves_what_certify_proves(tmp_path, affine):
    control_grid = 0.7 * np.random.default_rng(4).normal(size=(5, 6, 7, 3))
    path, image = saved(tmp_path, control_grid, affine)
    certificate = certify(control_grid, SHAPE)
    assert certificate.invertible and certificate.lower_bound < 0.8
    assert f"  in all its cells but the outermost (--image: in those of the image): {certificate}" in inspect(path)
    assert f"  inside the image: {certificate}" in inspect(path, image)


def test_inspect_judges_the_spline_inside_the_ring_that_was_added(tmp_path):
    control_grid = steep_spline(1, 1.4)  # and so 4.2 two cells beyond
    certificate = certify(control_grid, SHAPE)
    assert certificate.invertible
    path, image = saved(tmp_path, control_grid, LATTICES["straight"])
    *_, inside, ring = inspect(path)
    assert inside == f"  in all its cells but the outermost (--image: in those of the image): {certificate}"
    assert ring.startswith("  outside of the image it was made for")
    assert re.search(": it folds; not proven in [1-9][0-9]* of them$", ring)
    lines = list(inspect(path, image))
    assert f"  inside the image: {certificate}" in lines and not any("folds" in line for line in lines)


def test_inspect_is_silent_about_a_ring_that_is_proven(tmp_path):
    path, _ = saved(tmp_path, np.ones((4, 5, 6, 3)), LATTICES["straight"])
    *_, line = inspect(path)
    assert "but the outermost" in line and "invertible everywhere" in line


def test_inspect_finds_folds_inside(tmp_path):
    path, _ = saved(tmp_path, steep_spline(4), LATTICES["straight"])
    (line,) = [line for line in inspect(path) if "but the outermost" in line]
    assert "folds; not proven in 12 of 24 cells" in line


def test_inspect_judges_all_cells_of_a_spline_without_such_a_ring(tmp_path):
    spline = sitk.BSplineTransform(3, 3)
    spline.SetTransformDomainMeshSize([5, 4, 4])
    spline.SetTransformDomainPhysicalDimensions([5.0, 4.0, 4.0])
    values = np.zeros((3, 7, 7, 8))  # SimpleITK counts z, y, x
    values[0, 2:-2, 2:-2, 2] = -2.5
    spline.SetParameters(values.ravel())
    sitk.WriteTransform(spline, str(tmp_path / "map.tfm"))
    *_, line = inspect(tmp_path / "map.tfm")
    assert line.startswith("  in all its cells (--image: in those of the image): folds; not proven in")
    spline.SetTransformDomainMeshSize([1, 5, 2])  # So few that without a ring there would be none.
    spline.SetParameters(np.ones(3 * 4 * 8 * 5))
    sitk.WriteTransform(spline, str(tmp_path / "map.tfm"))
    *_, line = inspect(tmp_path / "map.tfm")
    assert "in all its cells (" in line and "invertible everywhere" in line


def test_inspect_looks_at_a_grid_where_the_image_comes_to_it(tmp_path):
    shape, turn = (20, 22, 24), sitk.Euler3DTransform((9.5, 10.5, 11.5), 0.6, 0.4, -0.5, (3.0, 0.0, -2.0))
    nifti.save(tmp_path / "image.nii", np.indices(shape, np.float32)[0], np.diag([-1.0, -1, 1, 1]))
    image = sitk.ReadImage(str(tmp_path / "image.nii"))
    spline = sitk.BSplineTransformInitializer(image, [4, 4, 4])
    spline.SetParameters(np.ones(3 * 7**3))
    after = sitk.CompositeTransform([spline, turn])  # turned first
    sitk.WriteTransform(after, str(tmp_path / "after.tfm"))
    unmoved = [after.TransformPoint(index) == turn.TransformPoint(index) for index in np.ndindex(shape)]
    outside = 100 * np.mean(unmoved)
    (line,) = [line for line in inspect(tmp_path / "after.tfm", tmp_path / "image.nii") if "outside its domain" in line]
    assert float(line.split()[0]) == pytest.approx(outside, abs=0.1) and outside > 20
    sitk.WriteTransform(sitk.CompositeTransform([spline, spline]), str(tmp_path / "twice.tfm"))
    lines = list(inspect(tmp_path / "twice.tfm", tmp_path / "image.nii"))
    assert len([line for line in lines if "outside its domain" in line]) == 1
    assert len([line for line in lines if "what is applied before it is no affine map" in line]) == 1
