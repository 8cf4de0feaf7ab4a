"""NCF as a system that `eval.py` knows."""

import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from gridreg_jax import rng
from gridreg_jax.ncf import optimise


def fit_ncf(
    fixed: Float32[np.ndarray, "X Y Z"],
    moving: Float32[np.ndarray, "X Y Z"],
    affine: Float[np.ndarray, "4 4"],
    *,
    seed: int,
    cache_dir: Path,
) -> tuple[Float32[np.ndarray, "X Y Z 3"], float]:
    """Displacement by `ncf.optimise`, and its seconds without those of compilation.

    NCF is this library's own code, which changes: nothing is kept in `cache_dir`.
    """
    optimise = _compiled(fixed.shape)
    images = jax.device_put((fixed[None, ..., None], moving[None, ..., None]))
    key = rng.key(seed, "ncf")
    start = time.perf_counter()
    displacement = jax.block_until_ready(optimise(*images, key=key))
    seconds = time.perf_counter() - start
    return np.asarray(displacement[0]), seconds


@functools.cache
def _compiled(shape: tuple[int, int, int]):
    image = jax.ShapeDtypeStruct((1, *shape, 1), jnp.float32)
    return jax.jit(optimise).lower(image, image, key=rng.key(0, "ncf")).compile()
