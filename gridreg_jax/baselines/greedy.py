"""greedy (Yushkevich et al., Penn Image Computing and Science Laboratory), by its Python package picsl-greedy."""

import functools
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gridreg_jax import geometry


def register(folder: Path, settings: str, threads: int) -> tuple[Path, Callable]:
    """Affine, then diffeomorphic; see `Program.register`.

    The affine part begins at the identity that greedy moves a little at random, without a seed.

    Args:
      settings: similarity and iterations of both parts, as greedy's options.
    """
    from picsl_greedy import Greedy3D

    matrix, warp = folder / "affine.mat", folder / "warp.nii.gz"
    common = f"{settings} -threads {threads} -V 0 -i {folder / 'fixed.nii'} {folder / 'moving.nii'}"
    program = Greedy3D()
    program.execute(f"-a -dof 12 -ia-identity {common} -o {matrix}", out=io.StringIO(), err=io.StringIO())
    # Displacements are stored to a tenth of a voxel unless told otherwise (-wp).
    program.execute(f"{common} -it {matrix} -o {warp} -wp 0", out=io.StringIO(), err=io.StringIO())
    return warp, functools.partial(geometry.voxel_to_world, affine=np.loadtxt(matrix))
