"""A registration program of others: how it is called, timed and remembered."""

import contextlib
import dataclasses
import hashlib
import tempfile
import time
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32

from gridreg_jax import geometry
from gridreg_jax.cores import cores
from gridreg_jax.data import nifti
from gridreg_jax.errors import InputError
from gridreg_jax.export.itk_files import load_displacement
from gridreg_jax.files import replacing

# Part of every cache key: raise it with every change of how a program is called or its result is read.
CACHE_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Program:
    """A system of `SYSTEMS` that another package computes, in files.

    Attributes:
      register: `(folder, settings, threads) -> (warp, linear)` for `fixed.nii` and `moving.nii` of a folder: `warp` is
        the path of a displacement on their lattice, as ITK stores it, and `linear` takes points (RAS mm) that it
        displaced to the moving image.
      settings: what it is told.
      package: on the Python package index; its version is part of what a result is known by.
      extra: of this library, that installs the package.
    """

    register: Callable[[Path, str, int], tuple[Path, Callable]]
    settings: str
    _: dataclasses.KW_ONLY
    package: str
    extra: str

    def __call__(
        self,
        fixed: Float32[np.ndarray, "X Y Z"],
        moving: Float32[np.ndarray, "X Y Z"],
        affine: Float[np.ndarray, "4 4"],
        *,
        seed: int,
        cache_dir: Path,
    ) -> tuple[Float32[np.ndarray, "X Y Z 3"], float]:
        """Displacement and seconds; both from `cache_dir` if the same registration has been done before.

        The programs do not take `seed`: what is kept is what they found the first time.

        Raises:
          InputError: the package is not installed.
        """
        entry = Path(cache_dir) / f"registration-{self._key(fixed, moving, affine)}.npz"
        with contextlib.suppress(OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile), np.load(entry) as stored:
            return stored["displacement"], float(stored["seconds"])
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            nifti.save(folder / "fixed.nii", fixed, affine)
            nifti.save(folder / "moving.nii", moving, affine)
            start = time.perf_counter()
            warp, linear = self.register(folder, self.settings, cores())
            seconds = time.perf_counter() - start
            displacement = displacement_in_voxels(warp, linear, affine)
        with replacing(entry) as temporary:
            np.savez(temporary, displacement=displacement, seconds=seconds)
        return displacement, seconds

    def version(self) -> str:
        """Of the package. Raises `InputError` if it is not installed."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError as error:
            raise InputError(f"{self.package} is not installed: pip install 'gridreg_jax[{self.extra}]'") from error

    def _key(self, *arrays: np.ndarray) -> str:
        told = (CACHE_VERSION, self.package, self.version(), self.settings, cores(), arrays[0].shape)
        digest = hashlib.sha256(repr(told).encode())
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:32]


def displacement_in_voxels(
    warp: Path, linear: Callable, affine: Float[np.ndarray, "4 4"]
) -> Float32[np.ndarray, "X Y Z 3"]:
    """The map `x -> linear(x + warp(x))` as one displacement in voxels of the fixed lattice.

    The displacement is stored on that lattice, so that nothing is interpolated.

    Args:
      warp: a displacement as ITK stores it.
      linear: from RAS mm to RAS mm, points `[P, 3]`.
      affine: voxel -> RAS mm, of both images.
    """
    displacement_mm, _ = load_displacement(warp)
    voxels = np.moveaxis(np.indices(displacement_mm.shape[:3]), 0, -1).reshape(-1, 3)
    points = linear(geometry.voxel_to_world(voxels, affine) + displacement_mm.reshape(-1, 3))
    displacement = geometry.world_to_voxel(points, affine) - voxels
    return displacement.reshape(displacement_mm.shape).astype(np.float32)
