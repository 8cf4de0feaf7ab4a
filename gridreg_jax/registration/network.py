"""A network's proposal for two images, trained before or fitted to the two: where the optimisation begins."""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from gridreg_jax import ncf, rng
from gridreg_jax.data.nifti import Volume
from gridreg_jax.data.preprocess import Lattice, place
from gridreg_jax.programs import stored
from gridreg_jax.registration.deformable import Start, on_lattice
from gridreg_jax.training.trained import Trained
from gridreg_jax.transforms.affine import apply_affine
from gridreg_jax.transforms.warp import identity_grid, sample


def propose(trained: Trained, fixed: Volume, moving: Volume, like: Volume) -> Start:
    """Run a network on two images, prepared as those it was trained on, and bring its map onto a lattice.

    Args:
      trained: the network.
      fixed, moving: images of any lattice.
      like: the lattice of the result. Off the network's own, u is what it is at the border.

    Raises:
      InputError: nothing of an image lies on the network's lattice.
    """
    data = trained.config["data"]
    lattice = Lattice(data["shape"], data["spacing"], data["center"])
    with ThreadPoolExecutor(2) as pool:
        on_fixed, on_moving = pool.map(lambda volume: place(volume, lattice), (fixed, moving))
    to_lattice = np.linalg.inv(on_fixed.affine) @ like.affine
    displacement, variance_mm2, predicted = _predict(
        trained.params,
        on_fixed.image,
        on_moving.image,
        to_lattice[:3],
        np.linalg.inv(to_lattice[:3, :3]),
        np.square(lattice.spacing, dtype=np.float32),
        model=trained.model,
        grid_size=trained.grid_size,
        shape=like.array.shape,
    )
    sigma_mm = None if variance_mm2 is None else np.sqrt(variance_mm2)
    label_maps = None
    if predicted is not None:
        label_maps = tuple(
            [Volume(np.asarray(one), side.affine, volume.path) for one in np.moveaxis(array[0], -1, 0)]
            for array, side, volume in zip(predicted, (on_fixed, on_moving), (fixed, moving), strict=True)
        )
    return Start(on_moving.affine @ np.linalg.inv(on_fixed.affine), np.asarray(displacement), sigma_mm, label_maps)


def fit_ncf(
    fixed: Volume, moving: Volume, matrix: Float[np.ndarray, "4 4"], mask: Volume | None
) -> Float32[np.ndarray, "X Y Z 3"]:
    """Displacement u by a neural correspondence field (`ncf.optimise`), for which `moving(matrix(x + u(x)))` is like
    `fixed(x)`.

    Args:
      fixed: normalised; u is on its lattice, in its voxels.
      moving: normalised, on any lattice.
      matrix: RAS mm of the fixed image -> RAS mm of the moving image.
      mask: where the fixed image counts (values other than 0); None: everywhere.
    """
    images = on_lattice(fixed, moving, mask, matrix, 1)
    return np.asarray(_fit_ncf(*images)[0])


@stored
def _fit_ncf(fixed, moving, known):
    return ncf.optimise(fixed, moving, key=rng.key(0, "ncf"), mask=known)


@functools.partial(stored, static_argnames=("model", "grid_size", "shape"))
def _predict(params, fixed, moving, to_lattice, to_voxels, squared_spacing, *, model, grid_size, shape):
    prediction = model.apply(params, fixed[None, ..., None], moving[None, ..., None], grid_size=grid_size)
    points = apply_affine(identity_grid(shape), to_lattice[:, :3], to_lattice[:, 3])
    displacement = sample(prediction.displacement[0], points)
    variance_mm2 = None
    if prediction.variance is not None:
        variance_mm2 = jnp.sum(sample(prediction.variance[0], points) * squared_spacing, axis=-1)
    return apply_affine(displacement, to_voxels), variance_mm2, prediction.label_maps
