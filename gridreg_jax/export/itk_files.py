"""Files of transforms: ITK's text, MATLAB and HDF5 files, and displacements in NIfTI.

Source: Insight Toolkit, itkTxtTransformIO, itkMatlabTransformIO, itkHDF5TransformIO.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.io
from jaxtyping import Float, Float64, Num

from gridreg_jax.data import nifti
from gridreg_jax.errors import InputError
from gridreg_jax.export.itk import AFFINE, FLIP, ItkTransform, affine_matrix, affine_transform, dense_field, understood

COMPOSITE, TFM_HEADER = "CompositeTransform_double_3_3", "#Insight Transform File V1.0"
# NIfTI's intent codes: ITK stores LPS vectors under the first and reads the second as RAS.
VECTOR, DISPVECT = 1007, 1006
# Numbers that are written as text at a time.
NUMBERS = 2_000_000


def write_tfm(path: str | Path, transforms: Sequence[ItkTransform]) -> None:
    """Writes ITK's text format (`.tfm`, `.txt`), whole or not at all; all digits, so that reading gives equal numbers.

    Raises:
      InputError: another suffix, no transform, or the file cannot be written.
    """
    lines = [TFM_HEADER]
    for number, transform in enumerate(_with_composite(transforms)):
        lines += [f"#Transform {number}", f"Transform: {transform.type}"]
        if transform.type != COMPOSITE:
            lines.append(f"Parameters: {_decimals(transform.parameters)}")
            lines.append(f"FixedParameters: {_decimals(transform.fixed_parameters)}")
    nifti.write_whole(_checked(path, ".tfm", ".txt"), ("\n".join(lines) + "\n").encode())


def write_mat(path: str | Path, transform: ItkTransform) -> None:
    """Writes one transform as MATLAB 4 file (`.mat`), the format of ANTs' affines; a B-spline takes half of `.tfm`.

    Raises:
      InputError: another suffix, or the file cannot be written.
    """
    content, path = io.BytesIO(), _checked(path, ".mat")
    columns = {transform.type: transform.parameters[:, None], "fixed": transform.fixed_parameters[:, None]}
    scipy.io.savemat(content, columns, format="4")
    nifti.write_whole(path, content.getvalue())


def write_h5(path: str | Path, transforms: Sequence[ItkTransform]) -> None:
    """Writes ITK's HDF5 format (`.h5`, `.hdf5`), whole or not at all.

    Raises:
      InputError: h5py is missing, another suffix, no transform, or the file cannot be written.
    """
    h5py, path = _h5py(), _checked(path, ".h5", ".hdf5")
    content = io.BytesIO()  # What goes wrong on a disk, h5py does not tell as an OSError.
    with h5py.File(content, "w") as file:
        for number, transform in enumerate(_with_composite(transforms)):
            group = file.create_group(f"TransformGroup/{number}")
            # ITK reads strings of variable length in ASCII only.
            group.create_dataset("TransformType", data=[transform.type], dtype=h5py.string_dtype("ascii"))
            if transform.type != COMPOSITE:
                group["TransformParameters"] = transform.parameters
                group["TransformFixedParameters"] = transform.fixed_parameters
    nifti.write_whole(path, content.getvalue())


def write(path: str | Path, transforms: Sequence[ItkTransform]) -> None:
    """Writes `.tfm`, `.txt`, `.mat`, `.h5` or `.hdf5`, by the suffix. In a `.mat` several affine transforms become one.

    Raises:
      InputError: as for `check_suffix`; several transforms for a `.mat`, of which one is not affine; else as for
        `write_tfm`, `write_mat` and `write_h5`.
    """
    check_suffix(path)
    match Path(path).suffix:
        case ".mat":
            write_mat(path, _as_one(path, transforms))
        case ".h5" | ".hdf5":
            write_h5(path, transforms)
        case _:
            write_tfm(path, transforms)


def check_suffix(path: str | Path, *others: str) -> None:
    """Raises `InputError` unless a path has a suffix for `write` or one of the others, and h5py is there if needed."""
    suffixes = (".tfm", ".txt", ".mat", ".h5", ".hdf5", *others)
    if not str(path).endswith(suffixes):
        raise InputError(f"{path}: a transform ends in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    if str(path).endswith((".h5", ".hdf5")):
        _h5py()


def read(path: str | Path) -> list[ItkTransform]:
    """The transforms of a file of any of these formats, by its suffix, as `understood` gives them; one at least.

    Raises:
      InputError: another suffix, there is no such file, it is damaged or holds no transform, or one that is not
        understood.
    """
    if not (transforms := _transforms_in(path)):
        raise InputError(f"{path}: holds no transform: it is to list at least one")
    try:
        return [understood(transform) for transform in transforms]
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _transforms_in(path: str | Path) -> list[ItkTransform]:
    """The transforms of a file as they are there; a displacement (NIfTI) as a field of vectors."""
    check_suffix(path, ".nii", ".nii.gz")
    for suffixes, reader in (((".tfm", ".txt"), read_tfm), ((".mat",), read_mat), ((".h5", ".hdf5"), read_h5)):
        if str(path).endswith(suffixes):
            return reader(path)
    displacement_mm, affine = load_displacement(path)
    return [dense_field(displacement_mm, affine)]


def read_tfm(path: str | Path) -> list[ItkTransform]:
    """The transforms of a text file of ITK's, in stored order; those of a composite without its own entry.

    Raises:
      InputError: there is no such file, or it is no such file.
    """
    path = nifti.existing_file(path)
    records = []
    try:
        first, *lines = path.read_text().splitlines()
        if not first.startswith("#Insight Transform File"):
            raise ValueError(f"the first line is not {TFM_HEADER!r}")
        for line in lines:
            key, _, value = line.partition(":")
            if key == "Transform":
                records.append({"type": value.strip()})
            elif key in ("Parameters", "FixedParameters"):
                records[-1][key] = np.array(value.split(), np.float64)
        return [
            ItkTransform(record["type"], record["Parameters"], record["FixedParameters"])
            for record in records
            if not record["type"].startswith("CompositeTransform")
        ]
    except (ValueError, LookupError) as error:
        raise InputError(f"{path}: is no text file of ITK transforms, or damaged ({error})") from error


def read_mat(path: str | Path) -> list[ItkTransform]:
    """The transform of a MATLAB 4 file of ITK's or ANTs', in a list as for the other formats. Errors as `read_tfm`."""
    path = nifti.existing_file(path)
    content = io.BytesIO(path.read_bytes())
    try:
        (kind, parameters), (_, fixed_parameters) = scipy.io.loadmat(content).items()
        parameters, fixed_parameters = (part.ravel().astype(np.float64) for part in (parameters, fixed_parameters))
    except Exception as error:  # A damaged file can raise anything: ValueError, TypeError, IndexError, MatReadError, …
        raise InputError(f"{path}: is no MATLAB 4 file of an ITK transform, or damaged") from error
    if kind.startswith("CompositeTransform"):
        raise InputError(f"{path}: a .mat file does not say what a composite is made of: write it as .tfm or .h5")
    return [ItkTransform(kind, parameters, fixed_parameters)]


def read_h5(path: str | Path) -> list[ItkTransform]:
    """The transforms of an HDF5 file of ITK's; needs h5py. Otherwise as `read_tfm`."""
    h5py, path = _h5py(), nifti.existing_file(path)
    transforms = []
    try:
        with h5py.File(path) as file:
            groups = file["TransformGroup"]
            for group in (groups[number] for number in sorted(groups, key=int)):
                kind = group["TransformType"].asstr()[0]
                if not kind.startswith("CompositeTransform"):
                    # Files before ITK 5 have the misspelt names.
                    start = "Transform" if "TransformParameters" in group else "Tranform"
                    names = (f"{start}Parameters", f"{start}FixedParameters")
                    transforms.append(ItkTransform(kind, *(group[name][:].astype(np.float64) for name in names)))
    except (OSError, LookupError, ValueError, TypeError) as error:
        raise InputError(f"{path}: is no HDF5 file of ITK transforms, or damaged ({error})") from error
    return transforms


def save_displacement(
    path: str | Path, displacement_mm: Float[np.ndarray, "X Y Z 3"], affine: Num[np.ndarray, "4 4"]
) -> None:
    """Writes a dense displacement as NIfTI (`.nii`, `.nii.gz`) that ITK and ANTs take for a vector image.

    Stored as float32 LPS mm of shape (X, Y, Z, 1, 3) with intent 1007; whole or not at all.

    Args:
      path: the file.
      displacement_mm: RAS mm, that is `affine[:3, :3]` times the displacement in voxels.
      affine: voxel -> RAS mm.

    Raises:
      InputError: another suffix, or the file cannot be written.
    """
    nifti.save(path, (displacement_mm * FLIP.astype(np.float32))[:, :, :, None], affine, intent=VECTOR)


def load_displacement(path: str | Path) -> tuple[Float64[np.ndarray, "X Y Z 3"], Float64[np.ndarray, "4 4"]]:
    """Displacement (RAS mm) and affine (voxel -> RAS mm) of a NIfTI file, in the order in which the file has its axes.

    Intent 1007 is taken for LPS vectors, which are ITK's, 1006 for RAS ones; ITK 5.4 and later do so too.

    Raises:
      InputError: there is no such file, it is not NIfTI or damaged, or not a field of the shape (X, Y, Z, 1, 3) with
        one of the two intents.
    """
    vectors, affine, intent = nifti.load_vectors(path)
    if intent not in (VECTOR, DISPVECT):
        raise InputError(f"{path}: a displacement has the intent 1007 (LPS) or 1006 (RAS), not {intent}")
    return vectors * (FLIP if intent == VECTOR else 1.0), affine


def _as_one(path: str | Path, transforms: Sequence[ItkTransform]) -> ItkTransform:
    """What a file that holds one transform can hold of several."""
    first, *others = _with_composite(transforms)
    if not others:
        return first
    if any(understood(transform).type != AFFINE for transform in transforms):
        raise InputError(
            f"{path}: a .mat file holds one transform, and these {len(transforms)} are not all affine: write them as "
            ".tfm, .txt or .h5"
        )
    return affine_transform(affine_matrix(transforms))


def _with_composite(transforms: Sequence[ItkTransform]) -> list[ItkTransform]:
    """What a file lists: several transforms are those of a composite, whose own entry comes first."""
    if not transforms:
        raise InputError("there is no transform to write")
    head = [ItkTransform(COMPOSITE, np.zeros(0), np.zeros(0))] if len(transforms) > 1 else []
    return [*head, *transforms]


def _decimals(values: Float64[np.ndarray, " P"]) -> str:
    """All digits of some numbers; a part at a time, as a dense field has tens of millions."""
    parts = np.array_split(values, values.size // NUMBERS + 1)
    return " ".join(" ".join(map(repr, part.tolist())) for part in parts)


def _checked(path: str | Path, *suffixes: str) -> Path:
    if not str(path).endswith(suffixes):
        raise InputError(f"{path}: the name must end in {' or '.join(suffixes)}")
    return Path(path)


def _h5py():
    try:
        import h5py
    except ImportError as error:
        raise InputError(".h5 files need h5py: pip install 'gridreg_jax[h5]', or use .tfm") from error
    return h5py
