"""Random numbers as a function of (seed, stream name, step): nothing random is ever stored, so resuming is exact."""

import zlib

import jax
import numpy as np


def key(seed: int, stream: str, step: int | jax.Array = 0) -> jax.Array:
    """JAX key of a named stream at a step. `step` may be traced."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _number(stream)), step)


def generator(seed: int, stream: str, step: int = 0) -> np.random.Generator:
    """NumPy generator of a named stream at a step, for decisions taken on the host."""
    return np.random.default_rng([seed, _number(stream), step])


def _number(stream: str) -> int:
    # crc32 rather than hash(): Python's hash of a string differs from process to process.
    return zlib.crc32(stream.encode())
