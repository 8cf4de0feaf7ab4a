"""From files to arrays that a network takes: one working lattice, intensities in [0, 1], and a cache of the result.

Every image has its own world frame. `lattice_affine` places the working lattice, axis-aligned in RAS, around a centre
of that image; a displacement on the lattice is in voxels of the lattice.
"""

import contextlib
import dataclasses
import functools
import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Num
from scipy import ndimage, sparse

from gridreg_jax import geometry
from gridreg_jax.data.nifti import Volume, existing_file, load_image, load_labels
from gridreg_jax.errors import InputError, check_known
from gridreg_jax.files import replacing
from gridreg_jax.transforms.interpolation import hat_weights

# Part of every cache key: raise it with every change of what `prepare` computes.
CACHE_VERSION = 6

CENTERS = ("mass", "image")
# Voxels: two lattices whose axes part by less across an image have the same axes.
ALIGNED = 1e-4


@dataclasses.dataclass(frozen=True)
class Lattice:
    """The working lattice, the same for all images.

    Attributes:
      shape: (X, Y, Z) voxels.
      spacing: mm along each axis.
      center: the world point of an image that comes to the middle of the lattice, voxel (shape - 1) / 2: its centre of
        "mass" (of intensities), or the middle of the "image" itself.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    center: str = "mass"

    def __post_init__(self):
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise InputError(f"lattice shape must be three positive whole numbers, not {self.shape}")
        if len(self.spacing) != 3 or not all(0 < step < np.inf for step in self.spacing):
            raise InputError(f"lattice spacing must be three positive numbers (mm), not {self.spacing}")
        check_known("lattice center", self.center, CENTERS)


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """An image on the working lattice; from a file, its arrays are read-only.

    Attributes:
      image: intensities in [0, 1]; 0 outside the field of view.
      known: which voxels lie in the field of view.
      above_zero: which had intensities above 0 (at the nearest voxel) before they were normalised.
      labels: on the same lattice, or None.
      affine: voxel of the lattice -> RAS mm.
    """

    image: Float32[np.ndarray, "X Y Z"]
    known: Bool[np.ndarray, "X Y Z"]
    above_zero: Bool[np.ndarray, "X Y Z"]
    labels: Int32[np.ndarray, "X Y Z"] | None
    affine: Float[np.ndarray, "4 4"]


def lattice_affine(volume: Volume, lattice: Lattice) -> Float[np.ndarray, "4 4"]:
    """Affine (voxel -> RAS mm) of the working lattice for an image: axes along RAS, centred as `lattice.center` says.

    An image whose voxels are of the lattice's size and along RAS keeps them: the lattice is then moved by half a voxel
    at most, so that neither intensities nor labels are resampled.
    """
    center = (np.array(volume.array.shape) - 1) / 2 if lattice.center == "image" else center_of_mass(volume.array)
    affine, middle = np.diag([*lattice.spacing, 1.0]), (np.array(lattice.shape) - 1) / 2
    if np.allclose(volume.affine[:3, :3], affine[:3, :3], rtol=0, atol=1e-4):
        center = np.rint(center - middle) + middle
    affine[:3, 3] = geometry.voxel_to_world(center, volume.affine) - affine[:3, :3] @ middle
    return affine


def resample(
    volume: Volume, affine: Float[np.ndarray, "4 4"], shape: tuple[int, int, int], *, labels: bool = False
) -> Float32[np.ndarray, "x y z"] | Int32[np.ndarray, "x y z"]:
    """Values of a volume on another lattice.

    Images are interpolated trilinearly. Where the target is coarser than the source, the source is smoothed first, by a
    Gaussian of `0.5 sqrt(r² - 1)` source voxels along each axis, `r` being the ratio of spacings: a voxel of any image
    is taken to carry a blur of half its own width (Lowe, IJCV 60, 2004, section 3.3), and the variances subtract
    (Cardoso et al., MICCAI 2015, derive the same form with 0.42 in place of 0.5). Labels take the nearest voxel, so
    that no label is invented.

    Args:
      volume: the source.
      affine: target voxel -> RAS mm.
      shape: of the target.
      labels: nearest neighbour, int32, 0 outside; else trilinear, float32, the source's minimum outside. The outside
        begins half a voxel beyond the outermost voxel centres.
    """
    matrix = np.linalg.inv(volume.affine) @ affine
    if labels:
        outside, result = 0, _nearest(volume.array, matrix, shape)
    else:
        source = volume.array.astype(np.float32, copy=False)
        outside, result = source.min(), _linear(source, matrix, shape)
    result[~field_of_view(volume, affine, shape)] = outside
    return result


def field_of_view(
    volume: Volume, affine: Float[np.ndarray, "4 4"], shape: tuple[int, int, int]
) -> Bool[np.ndarray, "x y z"]:
    """Which voxels of a lattice a volume shows: up to half a voxel beyond its outermost voxel centres.

    Args:
      affine: voxel of the lattice -> RAS mm.
      shape: of the lattice.
    """
    steps = np.ogrid[: shape[0], : shape[1], : shape[2]]
    inside = np.ones(shape, bool)
    for row, size in zip((np.linalg.inv(volume.affine) @ affine)[:3], volume.array.shape, strict=True):
        # Along an axis that the volume shares the position is a line of numbers, not a lattice of them.
        position = row[3] + sum(factor * step for factor, step in zip(row[:3], steps, strict=True) if factor)
        # The margin keeps rounding from deciding about a voxel that lies on the very edge.
        inside &= np.abs(position - (size - 1) / 2) <= size / 2 + 1e-6
    return inside


def normalise(array: Num[np.ndarray, "X Y Z"], *, beyond: float = 0.0) -> Float32[np.ndarray, "X Y Z"]:
    """Intensities in [0, 1]: `clip((v - low) / (high - low), 0, 1)`; with `beyond`, so much more at either end.

    `low` and `high` are the 1st and 99th percentile of the foreground, the voxels above the minimum: a background of
    one value stays 0 and does not count, however large, and an image without one loses only the tails. Where the two
    percentiles are equal (a mask), `low` is the minimum. A constant array becomes 0.

    Source: the range, Yan et al., Medical Physics 2026, section 4.1; the percentiles are this library's.
    """
    array = np.asarray(array, np.float32)
    foreground = array[array > array.min()]
    if foreground.size == 0:
        return np.zeros_like(array)
    low, high = np.percentile(foreground, [1, 99])
    if high <= low:
        low = array.min()
    return np.clip((array - np.float32(low)) / np.float32(high - low), -beyond, 1 + beyond)


def place(volume: Volume, lattice: Lattice) -> Prepared:
    """An image, normalised and then resampled to the working lattice, without labels.

    Raises:
      InputError: nothing of the image lies on the lattice.
    """
    affine = lattice_affine(volume, lattice)
    # Normalised before it is resampled: an image has the same intensities on every lattice.
    image = resample(dataclasses.replace(volume, array=normalise(volume.array)), affine, lattice.shape)
    if image.min() == image.max():
        raise InputError(
            f"{volume.path}: nothing of the image lies on the lattice of {lattice.shape} voxels of {lattice.spacing} "
            f"mm (center '{lattice.center}'): a larger lattice or another center is needed"
        )
    positive = dataclasses.replace(volume, array=(volume.array > 0).astype(np.int32))
    above_zero = resample(positive, affine, lattice.shape, labels=True) != 0
    return Prepared(image, field_of_view(volume, affine, lattice.shape), above_zero, None, affine)


def prepare(
    image_path: str | Path,
    lattice: Lattice,
    *,
    labels_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> Prepared:
    """An image, normalised and then resampled to the working lattice, and its labels.

    Args:
      image_path: NIfTI.
      lattice: the working lattice.
      labels_path: NIfTI on the lattice of the image.
      cache_dir: where results are kept, memory-mapped when they are read again; None keeps nothing. An entry depends on
        the paths, sizes and times of the files, on the lattice and on `CACHE_VERSION`; a damaged one is made again.
        Several processes may use one folder. Entries are never deleted.

    Raises:
      InputError: a file is not as it should be (see `load_image`, `load_labels`), nothing of the image lies on the
        lattice, or the cache cannot be written.
    """
    if cache_dir is None:
        return _build(image_path, lattice, labels_path)
    entry = Path(cache_dir) / _cache_key(image_path, lattice, labels_path)
    prepared = _read_cache(entry, lattice, with_labels=labels_path is not None)
    if prepared is None:
        prepared = _build(image_path, lattice, labels_path)
        _write_cache(entry, prepared)
    return prepared


def center_of_mass(array: Num[np.ndarray, "X Y Z"]) -> Float[np.ndarray, "3"]:
    """Centre of mass in voxels, of an array that is not constant (`load_image` sees to that).

    It counts normalised intensities (so that a few very bright voxels do not pull it), and only those of the brighter
    of two classes (so that neither the air around a body nor the size of the field of view does).
    """
    weights = normalise(array)
    weights[weights <= _threshold(weights)] = 0
    profiles = [weights.sum(axis=others, dtype=np.float64) for others in ((1, 2), (0, 2), (0, 1))]
    return np.array([np.average(np.arange(profile.size), weights=profile) for profile in profiles])


def _threshold(array: Float32[np.ndarray, "X Y Z"]) -> float:
    """Half-way between the means of the values below and above it (Ridler and Calvard, 1978), for values in [0, 1]."""
    threshold, previous = array.mean(dtype=np.float64), np.inf
    while abs(threshold - previous) > 1e-3:
        above = array > threshold
        previous = threshold
        threshold = (array[above].mean(dtype=np.float64) + array[~above].mean(dtype=np.float64)) / 2
    return float(threshold)


def _linear(source: Float32[np.ndarray, "X Y Z"], matrix, shape) -> Float32[np.ndarray, "x y z"]:
    """`source(matrix x)` at the voxels x of a lattice, smoothed before; beyond the source its outermost values."""
    linear, offset = matrix[:3, :3], matrix[:3, 3]
    if not _aligned(linear, shape):
        # For an oblique target, the length of a row is the extent of a target voxel along that source axis.
        source = ndimage.gaussian_filter(source, _sigma(np.linalg.norm(linear, axis=1)), mode="nearest")
        return ndimage.affine_transform(source, linear, offset, output_shape=shape, order=1, mode="nearest")
    for axis in range(3):
        size, *rest = source.shape
        weights = _axis_weights(size, shape[axis], float(linear[axis, axis]), float(offset[axis]))
        # The axis goes to the end, so that the next one comes first.
        source = np.ascontiguousarray(np.moveaxis((weights @ source.reshape(size, -1)).reshape(-1, *rest), 0, -1))
    return source


@functools.lru_cache(maxsize=64)
def _axis_weights(size: int, target: int, step: float, start: float) -> sparse.csr_array:
    """What smooths an axis and interpolates it at `start + step * i`, i below `target`, in one: four to ten times as
    fast as one after the other.
    """
    weights = hat_weights(size, start + step * np.arange(target))
    if abs(step) > 1:
        weights = weights @ ndimage.gaussian_filter1d(np.eye(size), _sigma(step), axis=0, mode="nearest")
    return sparse.csr_array(weights.astype(np.float32))


def _sigma(ratio):
    """Of the Gaussian that smooths before sampling in steps of so many voxels, in voxels."""
    return 0.5 * np.sqrt(np.maximum(np.square(ratio) - 1, 0))


def _nearest(source: Num[np.ndarray, "X Y Z"], matrix, shape) -> Num[np.ndarray, "x y z"]:
    """The same without smoothing, at the nearest voxel of the source."""
    linear, offset = matrix[:3, :3], matrix[:3, 3]
    if not _aligned(linear, shape):
        return ndimage.affine_transform(source, linear, offset, output_shape=shape, order=0, mode="nearest")
    for axis, (step, start, size) in enumerate(zip(np.diag(linear), offset, shape, strict=True)):
        position = np.floor(step * np.arange(size) + start + 0.5).astype(int)
        source = source.take(np.clip(position, 0, source.shape[axis] - 1), axis)
    return source


def _aligned(linear, shape) -> bool:
    """Whether a lattice of this shape has the axes of the source."""
    return bool((np.abs(linear - np.diag(np.diag(linear))) @ shape <= ALIGNED).all())


def _build(image_path: str | Path, lattice: Lattice, labels_path: str | Path | None) -> Prepared:
    volume = load_image(image_path)
    prepared = place(volume, lattice)
    if labels_path is not None:
        labels = resample(load_labels(labels_path, like=volume), prepared.affine, lattice.shape, labels=True)
        prepared = dataclasses.replace(prepared, labels=labels)
    for array in vars(prepared).values():
        if array is not None:
            array.flags.writeable = False
    return prepared


def _cache_key(image_path: str | Path, lattice: Lattice, labels_path: str | Path | None) -> str:
    parts: list = [CACHE_VERSION, lattice]
    for path in (image_path, labels_path):
        if path is not None:
            path = existing_file(path).resolve()
            pair = (".hdr", ".img")
            for part in map(path.with_suffix, pair) if path.suffix in pair else [path]:
                status = existing_file(part).stat()
                parts.append((str(part), status.st_mtime_ns, status.st_size))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _cache_files(entry: Path, *, with_labels: bool) -> dict[str, Path]:
    names = ["image", "known", "above_zero", "affine"] + ["labels"] * with_labels
    return {name: entry.with_name(f"{entry.name}-{name}.npy") for name in names}


def _read_cache(entry: Path, lattice: Lattice, *, with_labels: bool) -> Prepared | None:
    """What was written before, or None when it is missing or damaged."""
    shape = tuple(lattice.shape)
    expected = {"image": (shape, np.float32), "known": (shape, np.bool_), "above_zero": (shape, np.bool_)}
    expected |= {"labels": (shape, np.int32), "affine": ((4, 4), np.float64)}
    arrays = {"labels": None}
    for name, path in _cache_files(entry, with_labels=with_labels).items():
        with contextlib.suppress(Exception):  # NumPy raises whatever it meets in a damaged file
            arrays[name] = np.load(path, mmap_mode="r")
        array = arrays.get(name)
        if array is None or (array.shape, array.dtype) != expected[name]:
            return None
    return Prepared(**arrays)


def _write_cache(entry: Path, prepared: Prepared) -> None:
    try:
        for name, path in _cache_files(entry, with_labels=prepared.labels is not None).items():
            with replacing(path) as temporary:
                np.save(temporary, getattr(prepared, name))
    except OSError as error:
        raise InputError(
            f"{entry.parent}: cannot be written ({error}); data.cache_dir or $GRIDREG_CACHE names another cache"
        ) from error
