"""Systems that need no training set: NCF, and registration programs of others.

Each is a function `(fixed, moving, affine, *, seed, cache_dir) -> (displacement, seconds)` of two images `[X, Y, Z]` on
one lattice, whose affine goes from voxels to RAS mm; the displacement `[X, Y, Z, 3]` is in voxels and pulls back. The
seconds are those of the registration, with a thread for each of the `cores`.
"""

from gridreg_jax.baselines import ants, greedy
from gridreg_jax.baselines.network import fit_ncf
from gridreg_jax.baselines.program import Program

SYSTEMS = {
    "ncf": fit_ncf,
    "ants_syn": Program(ants.register, "SyN", package="antspyx", extra="ants"),
    "ants_syncc": Program(ants.register, "SyNCC", package="antspyx", extra="ants"),
    "greedy": Program(greedy.register, "-m NCC 2x2x2 -n 100x50x10", package="picsl-greedy", extra="greedy"),
}
