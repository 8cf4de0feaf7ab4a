"""Written transforms against SimpleITK, and the spline they hold against the map that the package itself computes."""

import struct
import sys

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from gridreg_jax import geometry
from gridreg_jax.errors import InputError
from gridreg_jax.export import itk, itk_files
from gridreg_jax.transforms.interpolation import INTERPOLATORS, interpolate

sitk = pytest.importorskip("SimpleITK")

SHAPE = (31, 37, 29)
GRID_SIZE = {"bspline": (7, 9, 6), "trilinear": (3, 4, 2)}
SAVE = {"bspline": itk.bspline_transform, "trilinear": itk.displacement_field}


def rotation(*angles):
    matrix = np.eye(3)
    for (a, b), angle in zip(((0, 1), (0, 2), (1, 2)), angles, strict=True):
        plane = np.eye(3)
        plane[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = matrix @ plane
    return matrix


def make_affine(linear):
    return nib.affines.from_matvec(linear, [-83.0, 41.5, 12.25])


AFFINES = {
    "oblique": make_affine(rotation(0.3, -0.2, 0.1) * [0.8, 1.1, 2.5]),
    "flipped": make_affine(rotation(0.1, 0.2, -0.3) @ np.diag([-0.9, 1.3, -2.0])),
    "permuted": make_affine(rotation(0.05, 0.0, 0.1)[:, [2, 0, 1]] * [3.0, 0.7, 1.0]),
    "mirrored": make_affine(np.diag([1.0, -1.0, 1.5])),
}


def random_grid(method, seed=0):
    return np.random.default_rng(seed).normal(size=(*GRID_SIZE[method], 3)) * 2.0


def voxels(count=500, seed=1):
    """Random points of the lattice, half of them at its corners and on its edges."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 1, (count, 3))
    points[: count // 2] = np.round(points[: count // 2])
    points[count // 4 : count // 2, 0] = rng.uniform(0, 1, count // 4)
    return points * (np.array(SHAPE) - 1)


@pytest.mark.parametrize("axis", range(3))
def test_beyond_the_image_a_spline_goes_back_to_its_value_at_the_border(axis):
    control_grid, affine = random_grid("bspline"), AFFINES["oblique"]
    transform = itk.bspline_transform(control_grid, SHAPE, affine)
    cell = (np.array(SHAPE) - 1) / np.subtract(control_grid.shape[:3], 3)
    for border, beyond in ((0, -cell[axis]), (SHAPE[axis] - 1, SHAPE[axis] - 1 + cell[axis])):
        points = voxels()
        moved = []
        for place in (border, beyond * (1 - 1e-9) + border * 1e-9):
            points[:, axis] = place
            points_mm = geometry.voxel_to_world(points, affine)
            moved.append(itk.apply([transform], points_mm) - points_mm)
        assert np.abs(moved[0]).max() > 1
        np.testing.assert_allclose(moved[1], moved[0], atol=1e-5)


def moved_mm(control_grid, points, affine, method):
    """Where the map takes points (voxels), in RAS mm, by the weight matrices of the package."""
    weights = [
        INTERPOLATORS[method](g, points[:, axis] / (SHAPE[axis] - 1)) for axis, g in enumerate(control_grid.shape[:3])
    ]
    displacement = np.einsum("pi,pj,pk,ijkc->pc", *weights, control_grid, optimize=True)
    return geometry.voxel_to_world(points + displacement, affine)


def by_sitk(transform, points_mm):
    return np.array([transform.TransformPoint(point) for point in (points_mm * itk.FLIP).tolist()]) * itk.FLIP


def round_trip(path, transforms):
    """Writes by the suffix; gives SimpleITK's reading and ours."""
    match path.suffix:
        case ".tfm" | ".txt":
            itk_files.write_tfm(path, transforms)
            return sitk.ReadTransform(str(path)), itk_files.read_tfm(path)
        case ".mat":
            (transform,) = transforms
            itk_files.write_mat(path, transform)
            return sitk.ReadTransform(str(path)), itk_files.read_mat(path)
        case ".h5":
            pytest.importorskip("h5py")
            itk_files.write_h5(path, transforms)
            return sitk.ReadTransform(str(path)), itk_files.read_h5(path)


SUFFIXES = [".tfm", ".txt", ".mat", ".h5"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
@pytest.mark.parametrize("method", SAVE)
def test_simpleitk_computes_the_same_map(tmp_path, method, affine, suffix):
    control_grid, points = random_grid(method), voxels()
    reference, stored = round_trip(tmp_path / f"map{suffix}", [SAVE[method](control_grid, SHAPE, affine)])
    expected = moved_mm(control_grid, points, affine, method)
    points_mm = geometry.voxel_to_world(points, affine)
    assert np.abs(expected - points_mm).max() > 1
    np.testing.assert_allclose(by_sitk(reference, points_mm), expected, atol=1e-9)
    np.testing.assert_allclose(itk.apply(stored, points_mm), expected, atol=1e-9)


@pytest.mark.parametrize("method", SAVE)
def test_the_dense_field_is_that_of_the_package_at_every_voxel(method):
    affine, control_grid = AFFINES["oblique"], random_grid(method)
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1).reshape(-1, 3)
    points_mm = geometry.voxel_to_world(grid, affine)
    dense = interpolate(jnp.asarray(control_grid[None], jnp.float32), SHAPE, method=method)
    expected = np.asarray(dense[0]).reshape(-1, 3) @ affine[:3, :3].T
    found = itk.apply([SAVE[method](control_grid, SHAPE, affine)], points_mm) - points_mm
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("method", SAVE)
def test_no_voxel_of_the_border_loses_its_displacement(tmp_path, method, name):
    control_grid = np.full((*GRID_SIZE[method], 3), 2.0)
    reference, stored = round_trip(tmp_path / "map.tfm", [SAVE[method](control_grid, SHAPE, AFFINES[name])])
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1).reshape(-1, 3)
    border = grid[((grid == 0) | (grid == np.array(SHAPE) - 1)).any(axis=1)]
    outwards = 0.5 * np.where(border == 0, -1, border == np.array(SHAPE) - 1)  # To the outer faces of the voxels.
    points_mm = geometry.voxel_to_world(np.concatenate([border, border + outwards]), AFFINES[name])
    expected = points_mm + AFFINES[name][:3, :3] @ [2.0, 2.0, 2.0]
    np.testing.assert_allclose(by_sitk(reference, points_mm), expected, atol=1e-9)
    np.testing.assert_allclose(itk.apply(stored, points_mm), expected, atol=1e-9)


@pytest.mark.parametrize("method", SAVE)
def test_our_reading_agrees_with_simpleitk_far_outside_too(tmp_path, method):
    affine = AFFINES["flipped"]
    reference, stored = round_trip(tmp_path / "map.tfm", [SAVE[method](random_grid(method), SHAPE, affine)])
    points_mm = geometry.voxel_to_world(np.random.default_rng(3).uniform(-40, 80, (2000, 3)), affine)
    expected = by_sitk(reference, points_mm)
    assert 100 < np.isclose(expected, points_mm, atol=1e-9).all(axis=1).sum() < 1900  # Some are outside ITK's box.
    np.testing.assert_allclose(itk.apply(stored, points_mm), expected, atol=1e-9)


@pytest.mark.parametrize("suffix", [".tfm", ".h5"])
@pytest.mark.parametrize("method", SAVE)
def test_an_affine_after_the_spline(tmp_path, method, suffix):
    affine, control_grid, points = AFFINES["oblique"], random_grid(method), voxels()
    matrix = nib.affines.from_matvec(rotation(-0.2, 0.4, 0.1) @ np.diag([1.1, 0.9, 1.0]), [5.0, -60.0, 7.0])
    transforms = [itk.affine_transform(matrix), SAVE[method](control_grid, SHAPE, affine)]
    reference, stored = round_trip(tmp_path / f"map{suffix}", transforms)
    expected = geometry.voxel_to_world(moved_mm(control_grid, points, affine, method), matrix)
    points_mm = geometry.voxel_to_world(points, affine)
    np.testing.assert_allclose(by_sitk(reference, points_mm), expected, atol=1e-9)
    np.testing.assert_allclose(itk.apply(stored, points_mm), expected, atol=1e-9)


# From voxels of a lattice to those under the grid: the same; turned, mirrored, finer and reaching beyond; oblique.
LATTICES = {
    "same": (np.eye(4), True),
    "turned": (nib.affines.from_matvec(np.eye(3)[:, [1, 2, 0]] * [0.7, -1.3, 0.9], [-2.0, -1.5, 40.0]), True),
    "oblique": (nib.affines.from_matvec(rotation(0.02, -0.01, 0.3), [1.0, 2.0, -3.0]), False),
}


@pytest.mark.parametrize("name", LATTICES)
@pytest.mark.parametrize("method", SAVE)
def test_a_whole_lattice_moves_as_its_points_do(monkeypatch, method, name):
    to_grid, along_its_axes = LATTICES[name]
    affine, shape = AFFINES["permuted"] @ to_grid, (29, 31, 30)
    spline = SAVE[method](random_grid(method), SHAPE, AFFINES["permuted"])
    matrix = nib.affines.from_matvec(rotation(-0.2, 0.4, 0.1), [5.0, -6.0, 7.0])
    transforms = [itk.affine_transform(matrix), spline]
    assert (itk._on_lattice(spline, shape, affine) is not None) == along_its_axes
    monkeypatch.setattr(itk, "SLAB", 10_000)
    found = itk.displacement(transforms, shape, affine)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    mapped = itk.apply(transforms, geometry.voxel_to_world(grid.reshape(-1, 3), affine))
    expected = geometry.world_to_voxel(mapped, affine).reshape(*shape, 3) - grid
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_reading_gives_the_written_numbers(tmp_path, suffix):
    transform = itk.bspline_transform(random_grid("bspline"), SHAPE, AFFINES["oblique"])
    _, (stored,) = round_trip(tmp_path / f"map{suffix}", [transform])
    assert stored.type == transform.type
    np.testing.assert_array_equal(stored.parameters, transform.parameters)
    np.testing.assert_array_equal(stored.fixed_parameters, transform.fixed_parameters)
    assert [path.name for path in tmp_path.iterdir()] == [f"map{suffix}"]


@pytest.mark.parametrize("suffix", [".tfm", ".mat", ".h5"])
def test_files_of_simpleitk_are_read(tmp_path, suffix):
    if suffix == ".h5":
        pytest.importorskip("h5py")
    read = {".tfm": itk_files.read_tfm, ".mat": itk_files.read_mat, ".h5": itk_files.read_h5}[suffix]
    rng = np.random.default_rng(4)
    affine = sitk.AffineTransform(3)
    affine.SetMatrix((np.eye(3) + 0.1 * rng.normal(size=(3, 3))).ravel())
    affine.SetTranslation([3.0, -4.0, 5.0])
    affine.SetCenter([10.0, 20.0, -30.0])
    spline = sitk.BSplineTransform(3, 3)
    spline.SetTransformDomainMeshSize([3, 4, 2])
    spline.SetTransformDomainOrigin([-20.0, -30.0, -10.0])
    spline.SetTransformDomainPhysicalDimensions([50.0, 60.0, 40.0])
    spline.SetTransformDomainDirection(rotation(0.2, 0.1, -0.3).ravel())
    spline.SetParameters(rng.normal(size=3 * 6 * 7 * 5))
    points_mm = rng.uniform(-40, 40, (500, 3))
    cases = [affine, spline] if suffix == ".mat" else [affine, spline, sitk.CompositeTransform([affine, spline])]
    for case in cases:
        sitk.WriteTransform(case, str(tmp_path / f"map{suffix}"))
        np.testing.assert_allclose(
            itk.apply(read(tmp_path / f"map{suffix}"), points_mm), by_sitk(case, points_mm), atol=1e-9
        )


def test_single_precision_mat_files_are_read(tmp_path):
    transform = itk.affine_transform(AFFINES["oblique"])
    content = b""
    for name, values in ((b"AffineTransform_float_3_3\0", transform.parameters), (b"fixed\0", np.zeros(3))):
        content += struct.pack("<5i", 10, len(values), 1, 0, len(name)) + name + values.astype("<f4").tobytes()
    path = tmp_path / "map.mat"
    path.write_bytes(content)
    points_mm = voxels(20)
    np.testing.assert_allclose(
        itk.apply(itk_files.read_mat(path), points_mm), itk.apply([transform], points_mm), rtol=1e-6, atol=1e-4
    )
    np.testing.assert_allclose(
        itk.apply([transform], points_mm), geometry.voxel_to_world(points_mm, AFFINES["oblique"]), atol=1e-12
    )


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_a_dense_displacement_is_the_map_that_simpleitk_reads(tmp_path, affine, suffix):
    shape = (5, 4, 6)
    displacement_mm = np.random.default_rng(5).normal(size=(*shape, 3)).astype(np.float32)
    path = tmp_path / f"field{suffix}"
    itk_files.save_displacement(path, displacement_mm, affine)
    field = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
    assert field.GetSize() == shape and field.GetNumberOfComponentsPerPixel() == 3
    transform = sitk.DisplacementFieldTransform(field)
    inside = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, 3)
    points_mm = geometry.voxel_to_world(inside, affine)
    np.testing.assert_allclose(by_sitk(transform, points_mm), points_mm + displacement_mm.reshape(-1, 3), atol=2e-4)
    found, found_affine = itk_files.load_displacement(path)
    np.testing.assert_allclose(found, displacement_mm, atol=1e-6)
    np.testing.assert_allclose(found_affine, affine, atol=1e-5)


def test_simpleitks_own_field_and_both_intents_are_read(tmp_path):
    vectors = np.random.default_rng(6).normal(size=(6, 4, 5, 3)).astype(np.float32)  # SimpleITK counts z, y, x.
    image = sitk.GetImageFromArray(vectors, isVector=True)
    image.SetSpacing([0.8, 1.2, 2.0])
    image.SetOrigin([10.0, -20.0, 30.0])
    path = tmp_path / "field.nii.gz"
    sitk.WriteImage(image, str(path))
    expected = vectors.transpose(2, 1, 0, 3) * itk.FLIP
    found, affine = itk_files.load_displacement(path)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(
        affine, np.diag([-0.8, -1.2, 2.0, 1]) + np.outer([-10, 20, 30, 0], [0, 0, 0, 1]), atol=1e-5
    )
    stored = nib.load(path)
    stored.header.set_intent(1006)
    nib.save(
        nib.Nifti1Image(np.asarray(stored.dataobj) * [-1, -1, 1], stored.affine, stored.header), tmp_path / "ras.nii"
    )
    np.testing.assert_allclose(itk_files.load_displacement(tmp_path / "ras.nii")[0], expected, atol=1e-6)


@pytest.mark.parametrize("unit", ["meter", "micron"])
def test_a_field_on_a_lattice_in_another_unit_is_the_map_that_simpleitk_reads(tmp_path, unit):
    vectors = np.random.default_rng(7).normal(size=(5, 4, 6, 1, 3)).astype(np.float32)
    image = nib.Nifti1Image(vectors, AFFINES["oblique"])
    image.set_qform(image.affine, 1)
    image.header.set_intent(1007)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "field.nii")
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(tmp_path / "field.nii"), sitk.sitkVectorFloat64))
    _, affine = itk_files.load_displacement(tmp_path / "field.nii")
    points_mm = geometry.voxel_to_world(np.random.default_rng(8).uniform(0, [4, 3, 5], (50, 3)), affine)
    expected = by_sitk(transform, points_mm)
    assert np.linalg.norm(expected - points_mm, axis=1).min() > 0.1
    found = itk.apply(itk_files.read(tmp_path / "field.nii"), points_mm)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("array_shape", "intent"), [((4, 5, 6, 3), 1007), ((4, 5, 6, 1, 3), 0), ((4, 5, 6, 1, 2), 1007)]
)
def test_other_niftis_are_no_displacements(tmp_path, array_shape, intent):
    image = nib.Nifti1Image(np.zeros(array_shape, np.float32), np.eye(4))
    image.header.set_intent(intent)
    nib.save(image, tmp_path / "field.nii")
    with pytest.raises(InputError, match="1007|of vectors"):
        itk_files.load_displacement(tmp_path / "field.nii")


@pytest.mark.parametrize("suffix", [".tfm", ".mat", ".h5", ".nii"])
@pytest.mark.parametrize(
    "content", [b"", b"nothing of the kind\n" * 30, b"#Insight Transform File V1.0\nParameters: 1 2\n"]
)
def test_damaged_files_are_refused_by_name(tmp_path, suffix, content):
    if suffix == ".h5":
        pytest.importorskip("h5py")
    read = {
        ".tfm": itk_files.read_tfm,
        ".mat": itk_files.read_mat,
        ".h5": itk_files.read_h5,
        ".nii": itk_files.load_displacement,
    }[suffix]
    path = tmp_path / f"map{suffix}"
    with pytest.raises(InputError, match="no such file"):
        read(path)
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"map{suffix}"):
        read(path)


def test_a_truncated_mat_file_is_refused(tmp_path):
    path = tmp_path / "map.mat"
    itk_files.write_mat(path, itk.affine_transform(np.eye(4)))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="damaged"):
        itk_files.read_mat(path)


def test_wrong_arguments_are_named(tmp_path):
    transform = itk.affine_transform(np.eye(4))
    with pytest.raises(InputError, match=r"\.tfm or \.txt"):
        itk_files.write_tfm(tmp_path / "map.mat", [transform])
    with pytest.raises(InputError, match="no transform"):
        itk_files.write_tfm(tmp_path / "map.tfm", [])
    with pytest.raises(InputError, match=r"\.nii"):
        itk_files.save_displacement(tmp_path / "map.mat", np.zeros((2, 2, 2, 3)), np.eye(4))
    with pytest.raises(InputError, match="at least 4"):
        itk.bspline_transform(np.zeros((3, 4, 4, 3)), SHAPE, np.eye(4))
    with pytest.raises(InputError, match="2 voxels"):
        itk.displacement_field(np.zeros((3, 4, 4, 3)), (8, 1, 8), np.eye(4))
    with pytest.raises(InputError, match="cannot be inverted"):
        itk.bspline_transform(np.zeros((4, 4, 4, 3)), SHAPE, np.diag([1.0, 0, 1, 1]))
    (tmp_path / "folder.tfm").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        itk_files.write_tfm(tmp_path / "folder.tfm", [transform])
    assert [path.name for path in tmp_path.iterdir()] == ["folder.tfm"]


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".nii.gz"])
def test_a_disk_that_is_full_is_told_in_one_line(tmp_path, suffix):
    resource, path = pytest.importorskip("resource"), tmp_path / f"map{suffix}"
    write, *content = itk_files.write, [itk.bspline_transform(random_grid("bspline"), SHAPE, np.eye(4))]
    if suffix == ".nii.gz":
        write, *content = itk_files.save_displacement, np.random.default_rng(9).normal(size=(20, 20, 20, 3)), np.eye(4)
    if suffix == ".h5":
        pytest.importorskip("h5py")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # To write more fails in the same way.
    try:
        with pytest.raises(InputError, match=rf"map\{suffix}: cannot be written \(File too large\)$"):
            write(path, *content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "count", "fixed", "message"),
    [
        ("BSplineDeformableTransform_double_3_3", 6, [0, 0, 0, 0], "not understood"),
        ("BSplineTransform_double_3_3_1", 6, [0, 0, 0, 0], "not understood"),
        ("Euler2DTransform_double_2_2", 3, [0, 0], "not understood"),
        ("AffineTransform_double_3_3", 6, [0, 0, 0], "12 parameters"),
        ("BSplineTransform_double_3_3", 81, [3, 3, 3, *[0] * 15], "at least 4"),
        ("DisplacementFieldTransform_double_3_3", 80, [3, 3, 3, *[0] * 15], "3 parameters a grid point"),
    ],
)
def test_transforms_that_cannot_be_applied_are_named(kind, count, fixed, message):
    with pytest.raises(InputError, match=message):
        itk.apply([itk.ItkTransform(kind, np.zeros(count), np.array(fixed, np.float64))], np.zeros((1, 3)))


def test_without_h5py_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match=r"gridreg_jax\[h5\]"):
        itk_files.write_h5(tmp_path / "map.h5", [itk.affine_transform(np.eye(4))])
