"""SyN of ANTs (Avants et al., Medical Image Analysis 2008), by its Python package antspyx."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

from gridreg_jax.export import itk, itk_files


def register(folder: Path, settings: str, threads: int) -> tuple[Path, Callable]:
    """Register as `ants.registration` does by default; see `Program.register`.

    Args:
      settings: ANTs' type of transform: "SyN" (an affine map, then SyN, both by mutual information, the latter not at
        full resolution) or "SyNCC" (rigid, affine, then SyN by local correlation down to full resolution).
      threads: taken the first time; ITK keeps the number as long as the process lives.
    """
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(threads)
    import ants

    images = (ants.image_read(str(folder / f"{side}.nii")) for side in ("fixed", "moving"))
    result = ants.registration(*images, type_of_transform=settings, outprefix=str(folder / "ants"))
    warp, matrix = result["fwdtransforms"]
    return Path(warp), functools.partial(itk.apply, itk_files.read(matrix))
