"""The working lattice, resampling (against SimpleITK), normalisation and the cache."""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from gridreg_jax import geometry
from gridreg_jax.data import preprocess
from gridreg_jax.data.nifti import Volume
from gridreg_jax.data.preprocess import Lattice, lattice_affine, normalise, place, prepare, resample
from gridreg_jax.errors import InputError
from gridreg_jax.files import default_cache_dir

SOURCES = {
    "aligned": (np.eye(3), (1.0, 1.0, 1.0)),
    "anisotropic": (np.eye(3), (0.9, 1.4, 6.0)),
    "flipped": (np.diag([-1.0, -1.0, 1.0]), (1.4, 1.4, 5.0)),
    "oblique": (np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0], (1.0, 1.3, 2.0)),
}


def source(name, shape=(17, 15, 12)) -> Volume:
    rotation, spacing = SOURCES[name]
    affine = nib.affines.from_matvec(rotation * spacing, [12.0, -31.0, 7.0])
    array = np.random.default_rng(0).uniform(-50, 200, shape).astype(np.float32)
    return Volume(array, affine, Path("source.nii"))


def target_around(volume: Volume, shape, spacing):
    """A lattice that overlaps the volume and its surroundings, with no voxel on a tie or on an edge."""
    center = geometry.voxel_to_world((np.array(volume.array.shape) - 1) / 2, volume.affine)
    start = center - np.array(spacing) * (np.array(shape) - 1) / 2 + [0.137, -0.211, 0.173]
    return nib.affines.from_matvec(np.diag(spacing), start)


def simpleitk_resample(volume: Volume, affine, shape, interpolator, outside):
    """The same resampling, through NIfTI-free ITK images in LPS."""
    import SimpleITK as sitk

    def describe(affine):
        affine = np.diag([-1.0, -1, 1, 1]) @ affine
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        return affine[:3, 3].tolist(), spacing.tolist(), (affine[:3, :3] / spacing).ravel().tolist()

    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.array.transpose(2, 1, 0)))
    origin, spacing, direction = describe(volume.affine)
    image.SetOrigin(origin)
    image.SetSpacing(spacing)
    image.SetDirection(direction)
    origin, spacing, direction = describe(affine)
    result = sitk.Resample(image, shape, sitk.Transform(), interpolator, origin, spacing, direction, float(outside))
    return sitk.GetArrayFromImage(result).transpose(2, 1, 0)


@pytest.mark.parametrize("name", SOURCES)
def test_image_is_resampled_as_by_simpleitk(name):
    sitk = pytest.importorskip("SimpleITK")
    volume = source(name)
    shape, spacing = (31, 33, 35), (0.8, 0.7, 0.9)  # Finer than every source: nothing is smoothed.
    affine = target_around(volume, shape, spacing)
    result = resample(volume, affine, shape)
    expected = simpleitk_resample(volume, affine, shape, sitk.sitkLinear, volume.array.min())
    assert result.dtype == np.float32
    assert 0.1 < (expected != volume.array.min()).mean()
    np.testing.assert_allclose(result, expected, atol=1e-2)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("step", [0.7, 2.6])
def test_labels_are_resampled_as_by_simpleitk(name, step):
    sitk = pytest.importorskip("SimpleITK")
    volume = source(name)
    labels = dataclasses.replace(volume, array=(volume.array // 40).astype(np.int32) + 2)
    shape = (21, 22, 23)
    affine = target_around(volume, shape, (step, step, step))
    result = resample(labels, affine, shape, labels=True)
    assert result.dtype == np.int32
    assert set(np.unique(result)) <= {0, *np.unique(labels.array)}
    np.testing.assert_array_equal(result, simpleitk_resample(labels, affine, shape, sitk.sitkNearestNeighbor, 0))


def test_resampling_on_its_own_lattice_changes_nothing():
    volume = source("oblique")
    np.testing.assert_allclose(resample(volume, volume.affine, volume.array.shape), volume.array, atol=1e-3)


def test_the_field_of_view_ends_half_a_voxel_beyond_the_outermost_centres():
    volume = Volume(np.full((4, 4, 4), 5.0, np.float32), np.diag([10.0, 1, 1, 1]), Path("slices.nii"))
    volume.array[3, 3, 3] = 1
    line = resample(volume, nib.affines.from_matvec(np.eye(3), [-6.0, 1, 1]), (43, 1, 1))[:, 0, 0]
    assert line.tolist() == [1.0] + [5.0] * 41 + [1.0]


def gaussian_blob(shape, spacing, sigma_mm):
    """Values of a Gaussian around the middle of a lattice; sigma (mm) along each axis."""
    grid = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in shape], indexing="ij"), axis=-1) * spacing
    return np.exp(-0.5 * np.sum((grid / sigma_mm) ** 2, axis=-1)).astype(np.float32)


def test_a_coarser_lattice_is_smoothed_by_the_stated_gaussian():
    shape, spacing = (61, 61, 31), np.array([1.0, 1.0, 2.0])
    sigma_mm = np.array([5.0, 5.0, 5.0])
    affine = nib.affines.from_matvec(np.diag(spacing), -spacing * (np.array(shape) - 1) / 2)
    volume = Volume(gaussian_blob(shape, spacing, sigma_mm), affine, Path("blob.nii"))
    # Three times coarser along x, twice along y, as fine along z; target centres fall on source centres.
    step = np.array([3.0, 2.0, 2.0])
    target_shape = (13, 15, 15)
    target = nib.affines.from_matvec(np.diag(step), -step * (np.array(target_shape) - 1) / 2)
    blurred_mm = np.sqrt(sigma_mm**2 + 0.25 * np.array([9.0 - 1, 4.0 - 1, 0]))
    expected = gaussian_blob(target_shape, step, blurred_mm) * np.prod(sigma_mm / blurred_mm)
    np.testing.assert_allclose(resample(volume, target, target_shape), expected, atol=2e-4)


def test_the_order_of_the_source_axes_does_not_matter():
    volume = source("anisotropic")
    turned = dataclasses.replace(
        volume, array=volume.array.transpose(2, 0, 1).copy(), affine=volume.affine[:, [2, 0, 1, 3]]
    )
    affine = target_around(volume, (6, 7, 8), (3.0, 2.0, 7.0))
    np.testing.assert_allclose(resample(turned, affine, (6, 7, 8)), resample(volume, affine, (6, 7, 8)), atol=1e-3)


def test_aliasing_is_removed():
    stripes = np.zeros((40, 8, 8), np.float32)
    stripes[::2] = 1
    volume = Volume(stripes, np.eye(4), Path("stripes.nii"))
    coarse = resample(volume, np.diag([4.0, 1, 1, 1]), (10, 8, 8))
    np.testing.assert_allclose(coarse[1:-1], 0.5, atol=0.02)


def test_normalise_is_the_stated_formula():
    array = np.random.default_rng(0).gamma(2, 100, (20, 20, 20)).astype(np.float32)
    array[:, :, :15] = 0
    low, high = np.percentile(array[array > 0], [1, 99])
    result = normalise(array)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, np.clip((array - low) / (high - low), 0, 1), atol=1e-6)
    assert not result[:, :, :15].any()
    more = normalise(array, beyond=0.2)
    np.testing.assert_array_equal(np.clip(more, 0, 1), result)
    assert more.min() < 0 and more.max() > 1 and np.abs(more - 0.5).max() <= 0.7 + 1e-6


def test_normalise_ignores_scale_offset_background_and_outliers():
    tissue = np.random.default_rng(0).uniform(100, 200, (12, 12, 12)).astype(np.float32)
    alone = np.pad(tissue, 2)
    expected = normalise(alone)
    np.testing.assert_allclose(normalise(3 * alone - 1000), expected, atol=1e-5)
    np.testing.assert_allclose(normalise(np.pad(tissue, 30))[28:-28, 28:-28, 28:-28], expected, atol=1e-6)
    alone[5, 5, 5] = 1e6
    result = normalise(alone)
    assert result[5, 5, 5] == 1
    assert np.abs(result - expected)[alone < 1e6].max() < 0.01


def test_normalise_of_an_image_without_background_keeps_its_contrast():
    array = np.random.default_rng(0).integers(2, 140, (20, 20, 20)).astype(np.uint8)
    result = normalise(array)
    assert result.min() == 0 and result.max() == 1
    assert ((result > 0) & (result < 1)).mean() > 0.95


def test_normalise_of_masks_and_constants():
    mask = np.zeros((4, 4, 4), np.float32)
    mask[1, 2] = 7
    np.testing.assert_array_equal(normalise(mask), mask / 7)
    np.testing.assert_array_equal(normalise(np.full((2, 2, 2), 3.0)), np.zeros((2, 2, 2)))


@pytest.mark.parametrize("name", SOURCES)
def test_the_middle_of_the_image_comes_to_the_middle_of_the_lattice(name):
    volume = source(name)
    lattice = Lattice((10, 11, 12), (2.0, 3.0, 4.0), center="image")
    affine = lattice_affine(volume, lattice)
    np.testing.assert_array_equal(affine[:3, :3], np.diag([2.0, 3.0, 4.0]))
    last = np.array(volume.array.shape) - 1
    corners = [volume.affine[:3] @ [*np.multiply(bits, last), 1] for bits in np.ndindex(2, 2, 2)]
    np.testing.assert_allclose(affine[:3] @ [4.5, 5, 5.5, 1], np.mean(corners, axis=0), atol=1e-9)


def ball(shape, center, radius):
    return np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - center, axis=-1) < radius


@pytest.mark.parametrize("shape", [(24, 24, 24), (50, 26, 34)])
def test_the_mass_of_a_body_comes_to_the_middle_whatever_the_field_of_view(shape):
    center = np.array([10.0, 11.0, 12.0])
    noise = np.random.default_rng(0).normal(-1000, 20, shape)
    volume = source("oblique")
    volume = dataclasses.replace(volume, array=np.where(ball(shape, center, radius=7), 50, noise).astype(np.float32))
    volume.array[0, 0, 0] = 1e5  # A metal artefact in a corner.
    affine = lattice_affine(volume, Lattice((9, 9, 9), (2.0, 2.0, 2.0)))
    np.testing.assert_allclose(affine[:3] @ [4, 4, 4, 1], volume.affine[:3] @ [*center, 1], atol=0.2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (((0, 4, 4), (1.0, 1.0, 1.0)), "shape"),
        (((4, 4, 4), (1.0, -1.0, 1.0)), "spacing"),
        (((4, 4, 4), (1.0, float("nan"), 1.0)), "spacing"),
        (((4, 4, 4), (1.0, 1.0, 1.0), "middle"), "center: 'middle' is not known; known are mass, image"),
    ],
)
def test_a_lattice_that_cannot_be_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Lattice(*fields)


LATTICE = Lattice((16, 16, 16), (2.0, 2.0, 2.0))


@pytest.fixture
def files(tmp_path):
    """A noisy ball in an oblique image, and its label."""
    volume = source("oblique", (30, 26, 22))
    inside = ball(volume.array.shape, (16, 12, 10), radius=6)
    image = np.where(inside, volume.array + 500, 0).astype(np.float32)
    nib.save(nib.Nifti1Image(image, volume.affine), tmp_path / "image.nii.gz")
    nib.save(nib.Nifti1Image(3 * inside.astype(np.uint8), volume.affine), tmp_path / "labels.nii.gz")
    return tmp_path / "image.nii.gz", tmp_path / "labels.nii.gz"


def test_prepare_keeps_world_positions(files):
    image_path, labels_path = files
    prepared = prepare(image_path, LATTICE, labels_path=labels_path)
    assert prepared.image.shape == prepared.labels.shape == LATTICE.shape
    assert prepared.image.dtype == np.float32 and prepared.labels.dtype == np.int32
    assert prepared.image.min() == 0 and 0.5 < prepared.image.max() <= 1
    raw = nib.load(labels_path)
    expected = raw.affine[:3] @ [*np.argwhere(raw.get_fdata() == 3).mean(axis=0), 1]
    found = geometry.voxel_to_world(np.argwhere(prepared.labels == 3).mean(axis=0), prepared.affine)
    np.testing.assert_allclose(found, expected, atol=0.5)
    assert prepare(image_path, LATTICE).labels is None


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_known_is_what_lies_in_the_field_of_view(name):
    sitk = pytest.importorskip("SimpleITK")
    volume = source(name)
    prepared = place(volume, Lattice((31, 32, 33), (0.83, 0.71, 0.91), "image"))
    inside = dataclasses.replace(volume, array=np.ones(volume.array.shape, np.int32))
    expected = simpleitk_resample(inside, prepared.affine, prepared.known.shape, sitk.sitkNearestNeighbor, 0)
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(prepared.known, expected.astype(bool))
    assert not prepared.image[~prepared.known].any()


@pytest.mark.parametrize("center", preprocess.CENTERS)
def test_an_image_with_the_voxels_of_the_lattice_keeps_them(tmp_path, center):
    rng = np.random.default_rng(0)
    images = rng.uniform(1, 2, (11, 12, 13)).astype(np.float32), rng.integers(0, 4, (11, 12, 13)).astype(np.uint8)
    paths = tmp_path / "image.nii", tmp_path / "labels.nii"
    for path, array in zip(paths, images, strict=True):
        nib.save(nib.Nifti1Image(array, nib.affines.from_matvec(np.diag([-1.5, 1, 1]), [7.3, -2.1, 0.4])), path)
    lattice = Lattice((14, 14, 18), (1.5, 1.0, 1.0), center)
    prepared = prepare(paths[0], lattice, labels_path=paths[1])
    assert prepared.known.sum() == images[0].size
    np.testing.assert_allclose(prepared.image[prepared.known], normalise(images[0][::-1]).ravel(), atol=1e-6)
    np.testing.assert_array_equal(prepared.labels[prepared.known], images[1][::-1].ravel())
    if center == "image":
        offset = np.argwhere(prepared.known).mean(axis=0) - (np.array(lattice.shape) - 1) / 2
        assert np.abs(offset).max() <= 0.5


def test_prepare_refuses_labels_of_another_image(files, tmp_path):
    nib.save(nib.Nifti1Image(np.ones((3, 3, 3), np.uint8), np.eye(4)), tmp_path / "other.nii")
    with pytest.raises(InputError, match="other.nii.*image.nii.gz"):
        prepare(files[0], LATTICE, labels_path=tmp_path / "other.nii")


def test_prepare_refuses_an_image_that_is_not_on_the_lattice(tmp_path):
    shape = (60, 12, 12)
    array = ball(shape, (6, 6, 6), radius=4) | ball(shape, (53, 6, 6), radius=4)
    nib.save(nib.Nifti1Image(array.astype(np.float32), np.eye(4)), tmp_path / "two_ends.nii")
    with pytest.raises(InputError, match="two_ends.nii: nothing of the image lies on the lattice"):
        prepare(tmp_path / "two_ends.nii", Lattice((8, 8, 8), (1.0, 1.0, 1.0)))


@pytest.fixture
def builds(monkeypatch):
    """Counts how often something is made rather than read from the cache."""
    calls = []
    build = preprocess._build
    monkeypatch.setattr(preprocess, "_build", lambda *args: calls.append(args) or build(*args))
    return calls


def assert_same(first, second):
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name))


def test_cache_gives_the_same_without_work(files, tmp_path, builds):
    image_path, labels_path = files
    cache = tmp_path / "cache"
    plain = prepare(image_path, LATTICE, labels_path=labels_path)
    written = prepare(image_path, LATTICE, labels_path=labels_path, cache_dir=cache)
    assert len(builds) == 2
    read = prepare(str(image_path), LATTICE, labels_path=labels_path, cache_dir=str(cache))
    assert len(builds) == 2
    assert isinstance(read.image, np.memmap) and isinstance(read.labels, np.memmap)
    assert_same(plain, written)
    assert_same(plain, read)
    for prepared in (written, read):
        with pytest.raises(ValueError, match="read-only"):
            prepared.image[0, 0, 0] = 1
    assert all(path.suffix == ".npy" and not path.name.startswith(".") for path in cache.iterdir())


def test_cache_follows_files_lattice_and_version(files, tmp_path, builds, monkeypatch):
    image_path, labels_path = files

    def built():
        before = len(builds)
        prepare(image_path, lattice, labels_path=labels, cache_dir=tmp_path / "cache")
        return len(builds) > before

    lattice, labels = LATTICE, None
    assert built() and not built()
    labels = labels_path
    assert built() and not built()
    lattice = dataclasses.replace(LATTICE, center="image")
    assert built() and not built()
    for path in files:
        later = path.stat().st_mtime_ns + 1_000_000_000
        os.utime(path, ns=(later, later))
        assert built() and not built()
    monkeypatch.setattr(preprocess, "CACHE_VERSION", preprocess.CACHE_VERSION + 1)
    assert built() and not built()


def test_cache_follows_both_files_of_a_pair(files, tmp_path, builds):
    image = nib.load(files[0])
    for factor in (1.0, 2.0):
        nib.save(nib.Nifti1Pair(factor * image.get_fdata(), image.affine), tmp_path / "pair.img")
        os.utime(tmp_path / "pair.hdr", ns=(0, 0))  # the header has not changed
        prepare(tmp_path / "pair.hdr", LATTICE, cache_dir=tmp_path / "cache")
    assert len(builds) == 2


@pytest.mark.parametrize("name", ["image", "labels", "affine"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "header", "another shape"])
def test_damaged_cache_is_made_again(files, tmp_path, builds, name, damage):
    image_path, labels_path = files
    cache = tmp_path / "cache"
    good = prepare(image_path, LATTICE, labels_path=labels_path, cache_dir=cache)
    (path,) = cache.glob(f"*-{name}.npy")
    if damage == "missing":
        path.unlink()
    elif damage == "another shape":
        np.save(path, np.zeros((2, 2), np.float32))
    else:
        kept = path.read_bytes()
        damaged = {"empty": b"", "truncated": kept[:-40], "text": b"not an array"}
        path.write_bytes((damaged | {"header": kept.replace(b"}", b"(", 1)})[damage])
    assert_same(prepare(image_path, LATTICE, labels_path=labels_path, cache_dir=cache), good)
    assert len(builds) == 2
    assert_same(prepare(image_path, LATTICE, labels_path=labels_path, cache_dir=cache), good)
    assert len(builds) == 2


def test_cache_may_be_filled_by_several_at_once(files, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: prepare(files[0], LATTICE, cache_dir=tmp_path / "cache"), range(8)))
    for result in results:
        assert_same(result, results[0])
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_cache_still_names_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="none.nii: no such file"):
        prepare(tmp_path / "none.nii", LATTICE, cache_dir=tmp_path / "cache")


def test_cache_that_cannot_be_written_is_named(files, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="cache: cannot be written .*GRIDREG_CACHE"):
        prepare(files[0], LATTICE, cache_dir=tmp_path / "cache")


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("GRIDREG_CACHE", str(tmp_path / "here"))
    assert default_cache_dir() == tmp_path / "here"
    monkeypatch.delenv("GRIDREG_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "gridreg_jax"


@pytest.mark.parametrize(
    ("image", "labels", "lattice"),
    [
        ("brain_mr/sub-1000_T1w_brain", "brain_mr/sub-1000_labels", Lattice((80, 96, 80), (2.0, 2.0, 2.0))),
        ("cardiac_mr/acdc005_ED", "cardiac_mr/acdc005_ED_labels", Lattice((72, 64, 40), (5.0, 5.0, 3.0), "image")),
    ],
)
def test_real_labels_stay_where_they_are_in_the_world(image, labels, lattice):
    """Files in LAS and LPS order, one of 10 mm slices: prepared, each label keeps its centroid in mm."""
    root = os.environ.get("GRIDREG_TEST_DATA")
    if not root:
        pytest.skip("GRIDREG_TEST_DATA names no folder of images")
    image, labels = (Path(root) / f"{name}.nii.gz" for name in (image, labels))
    prepared = prepare(image, lattice, labels_path=labels)
    raw = nib.load(labels)
    assert nib.aff2axcodes(raw.affine) != ("R", "A", "S")
    array = np.asanyarray(raw.dataobj)
    for label in np.argsort(np.bincount(array[array > 0]))[-3:]:
        expected = raw.affine[:3] @ [*np.argwhere(array == label).mean(axis=0), 1]
        found = geometry.voxel_to_world(np.argwhere(prepared.labels == label).mean(axis=0), prepared.affine)
        assert (np.abs(found - expected) <= np.array(lattice.spacing) / 2).all()
    # The intensities lie where the labels do.
    assert prepared.image[prepared.labels > 0].mean() > 1.5 * prepared.image[prepared.labels == 0].mean()
