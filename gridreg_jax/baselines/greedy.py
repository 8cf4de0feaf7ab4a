"""greedy (Yushkevich et al., Penn Image Computing and Science Laboratory), by its Python package picsl-greedy."""

import contextlib
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

    common = f"{settings} -threads {threads} -V 0 -i fixed.nii moving.nii"
    program = Greedy3D()
    with contextlib.chdir(folder):  # A path with a space would be two to it.
        program.execute(f"-a -dof 12 -ia-identity {common} -o affine.mat", out=io.StringIO(), err=io.StringIO())
        # Displacements are stored to a tenth of a voxel unless told otherwise (-wp).
        program.execute(f"{common} -it affine.mat -o warp.nii.gz -wp 0", out=io.StringIO(), err=io.StringIO())
    linear = functools.partial(geometry.voxel_to_world, affine=np.loadtxt(folder / "affine.mat"))
    return folder / "warp.nii.gz", linear
