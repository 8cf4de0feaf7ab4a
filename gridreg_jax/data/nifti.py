"""Reading and writing images, labels and landmarks: the only place where NIfTI is read.

What is read comes in the closest RAS orientation, so that array axes 0, 1, 2 run (about) to the right, to the front and
up, whatever the file's own order; the affine follows, and no world position changes. Lengths are in mm, whatever unit
the header names.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from jaxtyping import Float, Float32, Float64, Int32, Num, Shaped
from scipy import ndimage

from gridreg_jax import geometry
from gridreg_jax.data.lists import read_table
from gridreg_jax.errors import InputError
from gridreg_jax.files import replacing

LATTICE_TOLERANCE_MM = 1e-3
# The unit of length by its code in a header, where it is not the millimetre; one that is unknown is, as for ITK.
UNITS_MM = {1: 1e3, 3: 1e-3}
# Cosine of the angle that passes as a right one. From 1e-4 on ITK takes the qform of what is written, which is then off
# by up to 0.1 mm in a head.
RIGHT_ANGLE = 1e-3
# What zlib calls the gzip format with the largest window. ISA-L writes it five times as fast as zlib.
GZIP = 31


@dataclasses.dataclass(frozen=True, eq=False)
class Volume:
    """A volume read from a file, in RAS order.

    Attributes:
      array: float32 intensities or int32 labels.
      affine: voxel -> RAS mm.
      path: the file, for messages.
      stored_affine: of the file's own axes, voxel -> RAS mm; None where there is no file.
    """

    array: Float32[np.ndarray, "X Y Z"] | Int32[np.ndarray, "X Y Z"]
    affine: Float[np.ndarray, "4 4"]
    path: Path
    stored_affine: Float[np.ndarray, "4 4"] | None = None


# What an image can be given as: a NIfTI file, such an image of nibabel's, or an array with its affine (voxel -> RAS).
Source = str | Path | nib.spatialimages.SpatialImage | tuple[np.ndarray, np.ndarray]


def load_image(path: Source, *, placed: bool = False, constant: bool = False) -> Volume:
    """Intensities of a NIfTI file (`.nii`, `.nii.gz`), or of what else `Source` allows, float32.

    Args:
      path: the file, or what else `Source` allows.
      placed: a header must say where in the world its voxels lie; a warning says if it gives two places.
      constant: one value in all voxels will do.

    Raises:
      InputError: there is no such file, it is damaged or not NIfTI, not three-dimensional (trailing axes of size 1 are
        dropped), empty, constant, has values that are not finite, or its affine cannot be inverted or is missing.
    """
    array, affine, path, stored_affine = _read(path, placed=placed)
    with np.errstate(over="ignore"):  # What float32 cannot hold becomes infinite and is reported below.
        array = np.ascontiguousarray(array, np.float32)
    _check_finite(array, path)
    if not constant and array.min() == array.max():
        raise InputError(f"{path}: every voxel is {array.flat[0]:g}: there is nothing to register")
    return Volume(array, affine, path, stored_affine)


def load_labels(path: Source, like: Volume | None = None, *, placed: bool = False) -> Volume:
    """Labels of a NIfTI file, int32.

    Args:
      path: the label file.
      like: the image that the labels belong to: both must lie on one lattice.
      placed: as for `load_image`.

    Raises:
      InputError: as for `load_image` (constant labels are allowed), a value is not a whole number that int32 can hold,
        or the lattice differs from that of `like` (in shape, or at a corner by more than 0.001 mm or a tenth of a
        voxel).
    """
    array, affine, path, stored_affine = _read(path, placed=placed)
    _check_finite(array, path)
    array = array.astype(np.float64)
    rounded = np.rint(array)
    wrong = (np.abs(array - rounded) > 1e-3) | (np.abs(rounded) > np.iinfo(np.int32).max)
    if wrong.any():
        example = f"{wrong.sum()} voxels are not, such as {array[wrong][0]:g}"
        raise InputError(f"{path}: labels must be whole numbers (of 32 bits): {example}")
    volume = Volume(np.ascontiguousarray(rounded, np.int32), affine, path, stored_affine)
    if like is not None:
        _check_lattice(volume, like)
    return volume


def load_lattice(path: Source) -> Volume:
    """The lattice of a NIfTI file, whatever its values: a volume of zeros. Axes after the third do not count.

    Raises:
      InputError: as for `load_image` with `placed`, as far as the header tells.
    """
    return Volume(*_read(path, placed=True, values=False))


def load_landmarks(path: str | Path) -> dict[int, Float[np.ndarray, "3"]]:
    """World positions (RAS mm) of landmarks by their id: equal ids are the same point in two images.

    Args:
      path: a CSV file with the columns x, y, z (RAS mm) and, optionally, `id` (else rows count from 1); or a NIfTI file
        of labels, of which each value but 0 is an id, and the centroid of its voxels the position.

    Raises:
      InputError: another suffix; a column is missing or there twice, a cell is not a finite number, an id is there
        twice, there is no landmark; for NIfTI as for `load_labels`.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        return _landmarks_of_csv(path)
    if not path.name.lower().endswith((".nii", ".nii.gz", ".hdr", ".img")):
        raise InputError(f"{path}: landmarks are read from .csv (x, y, z: RAS mm), or as blobs from .nii, .nii.gz")
    return _landmarks_of_blobs(path)


def load_vectors(path: str | Path) -> tuple[Float[np.ndarray, "X Y Z 3"], Float[np.ndarray, "4 4"], int]:
    """Vectors of a NIfTI file of shape (X, Y, Z, 1, 3), its affine (voxel -> RAS mm) and its intent code.

    As they are in the file: neither axes nor components are reordered.

    Raises:
      InputError: there is no such file, it is damaged or not NIfTI, or of another shape.
    """
    path = existing_file(path)
    with _reading(path):
        image = nib.load(path)
        vectors, intent = image.get_fdata(), int(image.header["intent_code"])
    if vectors.ndim != 5 or vectors.shape[3:] != (1, 3):
        raise InputError(f"{path}: a field of vectors has the shape (X, Y, Z, 1, 3), not {vectors.shape}")
    return vectors[:, :, :, 0], _check_affine(_in_mm(image.affine, image.header), path), intent


def check_right_angles(volume: Volume) -> None:
    """Raise `InputError` if a volume's axes are not at right angles, which neither ITK nor a qform can hold."""
    axes = volume.affine[:3, :3] / geometry.spacing(volume.affine)
    cosine = np.abs(axes.T @ axes - np.eye(3)).max()
    if cosine > RIGHT_ANGLE:
        raise InputError(
            f"{volume.path}: its axes are {np.degrees(np.arcsin(cosine)):.2g} degrees off right angles: results on its "
            "lattice could not be read by ITK and ANTs; resample it first"
        )


def corner_to_corner(volume: Volume, shape: tuple[int, int, int]) -> Float[np.ndarray, "4 4"]:
    """Affine (voxel -> RAS mm) of a lattice of another shape whose corner voxels are those of the volume.

    An axis of a single voxel keeps its spacing.
    """
    steps = np.maximum(np.subtract(volume.array.shape, 1), 1) / np.maximum(np.subtract(shape, 1), 1)
    return volume.affine @ np.diag([*steps, 1.0])


def as_stored(
    array: Shaped[np.ndarray, "X Y Z *rest"], volume: Volume
) -> tuple[Shaped[np.ndarray, "x y z *rest"], Float[np.ndarray, "4 4"]]:
    """An array on the lattice of a volume, or on one with its corners, with axes as in the volume's file.

    Returns:
      The array, and its affine (voxel -> RAS mm): that of the file, if the lattice is the volume's.
    """
    affine = volume.affine if volume.stored_affine is None else volume.stored_affine
    orientation = nib.orientations.ornt_transform(nib.io_orientation(volume.affine), nib.io_orientation(affine))
    array, stored = (nib.apply_orientation(each, orientation) for each in (array, volume.array))
    return array, corner_to_corner(Volume(stored, affine, volume.path), array.shape[:3])


def stored_shape(volume: Volume) -> tuple[int, ...]:
    """Voxels along the axes of the volume's file, as its header names them."""
    return as_stored(volume.array, volume)[0].shape


def describe(path: str | Path) -> tuple[tuple[int, ...], int]:
    """Shape and intent code of a NIfTI file, whatever it holds. Errors as for `load_vectors`."""
    path = existing_file(path)
    with _reading(path):
        image = nib.load(path)
        return image.shape, int(image.header["intent_code"])


def save(
    path: str | Path, array: Shaped[np.ndarray, "X Y Z *rest"], affine: Num[np.ndarray, "4 4"], *, intent: int = 0
) -> None:
    """Writes a NIfTI file (`.nii`, `.nii.gz`), whole or not at all; its folder is made when missing.

    Args:
      path: the file.
      array: floats are stored as float32, integers as they are (of 64 bits as int32), bool as uint8.
      affine: voxel -> RAS mm, stored as both sform and qform with code 1 (scanner).
      intent: NIfTI's code of what the values mean, 0 for none.

    Raises:
      InputError: another suffix, integers that int32 cannot hold, or the file cannot be written.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError(f"{path}: an image is written as .nii or .nii.gz")
    image = nib.Nifti1Image(_storable(array, path), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header.set_intent(intent)
    content = image.to_bytes()
    if path.suffix == ".gz":
        content = isal_zlib.compress(content, 2, GZIP)
    write_whole(path, content)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file of any format, or none; its folder is made when missing. InputError: it cannot be written."""
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def existing_file(path: str | Path) -> Path:
    """The path of a file that is there; else an InputError that names it."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    return path


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # A damaged file can raise anything: OSError, EOFError, zlib.error, HeaderDataError, …
        raise InputError(f"{path}: cannot be read as NIfTI; damaged or another format? ({error})") from error


def _as_image(array, affine) -> nib.Nifti1Image:
    array, affine = np.asarray(array), np.asarray(affine)
    if affine.shape != (4, 4) or affine.dtype.kind not in "iuf":
        raise InputError(f"the array's affine must be 4 x 4 numbers, voxel -> RAS mm, not {affine.dtype}{affine.shape}")
    if array.dtype.kind not in "biuf":
        raise InputError(f"the array's voxels must be single real numbers, not {array.dtype}")
    # NIfTI has neither of these.
    array = array.astype({"bool": np.uint8, "float16": np.float32}.get(array.dtype.name, array.dtype), copy=False)
    return nib.Nifti1Image(array, affine.astype(np.float64), dtype=array.dtype)


def _read(
    source: Source, *, placed: bool = False, values: bool = True
) -> tuple[Num[np.ndarray, "X Y Z"], Float[np.ndarray, "4 4"], Path, Float[np.ndarray, "4 4"]]:
    """Array in scaled numbers (or of zeros) and affine, both in RAS order; the file's name and its own affine."""
    if isinstance(source, (tuple, list)):
        source = _as_image(*source) if len(source) == 2 else source
    if not isinstance(source, (str, os.PathLike, nib.spatialimages.SpatialImage)):
        raise InputError(f"an image is a path, an image of nibabel's, or (array, affine), not {type(source).__name__}")
    in_memory = isinstance(source, nib.spatialimages.SpatialImage)
    path = Path(source.get_filename() or "the array") if in_memory else existing_file(source)
    with _reading(path):
        image = source if in_memory else nib.load(path)
        if values and not in_memory and path.suffix == ".gz" and isinstance(image, nib.Nifti1Image):
            # To the very end, where the checksum is; nibabel stops at the last voxel.
            image = type(image).from_bytes(igzip.decompress(path.read_bytes()))
        array = np.asanyarray(image.dataobj) if values else np.broadcast_to(np.float32(0), image.shape[:3])
    if not isinstance(image, nib.Nifti1Pair):
        raise InputError(f"{path}: is {type(image).__name__}, not NIfTI")
    if array.dtype.kind not in "iuf":
        raise InputError(f"{path}: voxels must be single real numbers, not {array.dtype}")
    if 0 in image.shape:
        raise InputError(f"{path}: the volume is empty, of shape {image.shape}")
    if len(image.shape) < 3 or (values and any(size != 1 for size in image.shape[3:])):
        raise InputError(f"{path}: one three-dimensional volume is needed, not an array of shape {image.shape}")
    if placed and not (image.header["sform_code"] or image.header["qform_code"]):
        raise InputError(f"{path}: its header has no affine (sform and qform are unset): where it lies is unknown")
    affine = stored_affine = _check_affine(_in_mm(image.affine, image.header), path)
    if placed:
        _warn_of_two_places(image, path)
    array = array.reshape(image.shape[:3])
    orientation = nib.io_orientation(affine)
    affine = affine @ nib.orientations.inv_ornt_aff(orientation, array.shape)
    return nib.apply_orientation(array, orientation), affine, path, stored_affine


def _in_mm(affine: Num[np.ndarray, "4 4"], header: nib.Nifti1Header) -> Float64[np.ndarray, "4 4"]:
    """An affine in the header's unit of length as voxel -> RAS mm."""
    unit_mm = UNITS_MM.get(int(header["xyzt_units"]) & 7, 1.0)  # The bits above are the unit of time.
    return affine * np.array([[unit_mm]] * 3 + [[1.0]])


def _check_affine(affine: Float[np.ndarray, "4 4"], path: Path) -> Float[np.ndarray, "4 4"]:
    # The ratio is the volume of a cell of unit edges: 1 for right angles, 0 for flat cells (and NaN for edges of 0 mm).
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.abs(np.linalg.det(affine[:3, :3] / geometry.spacing(affine)))
    if not (np.isfinite(affine).all() and ratio > 1e-6):
        raise InputError(f"{path}: the affine of its header cannot be inverted: {affine[:3].round(4).tolist()}")
    return affine


def _warn_of_two_places(image: nib.Nifti1Pair, path: Path) -> None:
    if not (image.header["sform_code"] and image.header["qform_code"]):
        return
    try:
        sform, qform = (_in_mm(form, image.header) for form in (image.header.get_sform(), image.header.get_qform()))
    except Exception:  # A qform that cannot be read is not in use.
        return
    distance_mm = _distance_mm(image.shape[:3], sform, qform)
    # Rounding alone can set a qform 0.4 mm off.
    if distance_mm > geometry.spacing(sform).min() / 2:
        warnings.warn(
            f"{path}: its sform and qform lie up to {distance_mm:.3g} mm apart: the sform counts here, in ITK and ANTs "
            "perhaps the qform",
            stacklevel=2,
        )


def _distance_mm(shape: tuple[int, int, int], affine: np.ndarray, other: np.ndarray) -> float:
    """Largest distance between the places of a corner voxel under two affines."""
    corners = np.array(list(itertools.product(*[(0, size - 1) for size in shape])))
    difference_mm = geometry.voxel_to_world(corners, affine) - geometry.voxel_to_world(corners, other)
    return np.linalg.norm(difference_mm, axis=-1).max()


def _check_finite(array: Num[np.ndarray, "X Y Z"], path: Path) -> None:
    count = array.size - np.isfinite(array).sum()
    if count:
        what = "NaN, infinite or beyond the range of float32"
        raise InputError(f"{path}: {count} of {array.size} voxels are not finite ({what})")


def _check_lattice(labels: Volume, image: Volume) -> None:
    if labels.array.shape != image.array.shape:
        own, its = stored_shape(labels), stored_shape(image)
        raise InputError(f"{labels.path}: its shape {own} is not {its}, that of its image {image.path}")
    distance_mm = _distance_mm(image.array.shape, labels.affine, image.affine)
    if distance_mm > min(LATTICE_TOLERANCE_MM, geometry.spacing(image.affine).min() / 10):
        raise InputError(
            f"{labels.path}: its voxels lie up to {distance_mm:.3g} mm from those of its image {image.path}; "
            "resample the labels to the image"
        )


def _landmarks_of_csv(path: Path) -> dict[int, Float[np.ndarray, "3"]]:
    landmarks = {}
    for count, (number, row) in enumerate(read_table(path, required=["x", "y", "z"], optional=["id"]), start=1):
        try:
            landmark = int(row["id"]) if "id" in row else count
            position_mm = np.array([float(row[axis]) for axis in "xyz"])
        except ValueError as error:
            raise InputError(f"{path}: row {number}: x, y, z must be numbers, id a whole number ({error})") from error
        if not all(map(math.isfinite, position_mm)):
            raise InputError(f"{path}: row {number}: x, y, z must be finite, not {position_mm.tolist()}")
        if landmark in landmarks:
            raise InputError(f"{path}: row {number}: id {landmark} is there twice")
        landmarks[landmark] = position_mm
    return landmarks


def _landmarks_of_blobs(path: Path) -> dict[int, Float[np.ndarray, "3"]]:
    volume = load_labels(path)
    ids = [int(value) for value in np.unique(volume.array) if value != 0]
    if not ids:
        raise InputError(f"{path}: there is no landmark: every voxel is 0")
    centroids = np.array(ndimage.center_of_mass(np.ones_like(volume.array), volume.array, ids))
    return dict(zip(ids, geometry.voxel_to_world(centroids, volume.affine), strict=True))


def _storable(array: np.ndarray, path: Path) -> np.ndarray:
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    if array.dtype.itemsize < 8:
        return array
    narrow = array.astype(np.int32)
    if (narrow != array).any():
        raise InputError(f"{path}: integers beyond 32 bits cannot be written")
    return narrow
