"""Instance optimisation: gradient steps that fit the control grid of a pair to its own two images, without labels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

from gridreg_jax.errors import InputError, check_known
from gridreg_jax.losses import SIMILARITIES, bending_energy_of_map, folding_penalty, soft_dice_of_probabilities
from gridreg_jax.transforms.interpolation import interpolate
from gridreg_jax.transforms.warp import half_lattice, integrate, warp

# Voxels an axis of the box in which intensities are correlated: small, so that thin structures count.
WINDOW = 5
# What a control grid can stand for: displacements; or a stationary velocity, with the similarity of the fixed and the
# warped moving image, or also that of the moving image and the fixed one under the inverse.
METHODS = ("grid", "velocity", "symmetric")
# Voxels an axis from one that counts in the overlap of labels to the next.
STRIDE = 2
# Of a velocity at half the resolution.
SQUARINGS = 6


def refine_recorded(
    control_grid: Float[Array, "N gx gy gz 3"],
    fixed: Float[Array, "N X Y Z 1"],
    moving: Float[Array, "N x y z 1"],
    *,
    steps: int,
    bending: float | Float[Array, ""],
    learning_rate: float | Float[Array, ""],
    interpolator: str,
    similarity: str = "lncc",
    mask: Shaped[Array, "N X Y Z"] | None = None,
    label_maps: tuple[Float[Array, "N X Y Z L"], Float[Array, "N x y z L"]] | None = None,
    overlap: float | Float[Array, ""] = 1.0,
    folding: float | Float[Array, ""] | None = None,
    method: str = "grid",
    from_start: bool = False,
    spacing: Float[Array, "3"] | None = None,
) -> tuple[Float[Array, "N gx gy gz 3"], Float[Array, "steps N"]]:
    """Lower `similarity(fixed, warped) + bending * bending energy` by Adam, from a control grid that is good already.

    A network gives every pair the map that is right on average; what it leaves, a fraction of a voxel here and there,
    the pair's own local correlation shows. Pairs of a batch do not influence each other.

    Args:
      control_grid: the start, displacements in voxels.
      moving: on the lattice of `fixed`, or one that is longer by as many voxels at either end of an axis.
      steps: of Adam (0: the start is returned), its step size falling to 0 along a cosine; static under jit.
      bending: weight of the bending energy (per squared voxel).
      learning_rate: largest change of a control point in the first step, voxels.
      interpolator: of the control grid.
      similarity: a name in `losses.SIMILARITIES`; "lncc" with windows of `WINDOW` voxels.
      mask: weight of each voxel in the similarity and in the overlap.
      label_maps: probabilities of labels in the fixed and in the moving image, whose overlap is to grow too.
      overlap: weight of that, `losses.soft_dice_of_probabilities`.
      folding: weight of `losses.folding_penalty`; None for no such term.
      method: a name in `METHODS`.
      from_start: the bending energy is that of the change from the start, not that of the map: what a network has
        learnt of maps, from labels too, is kept.
      spacing: lengths of a voxel's sides in some unit, which then takes the place of voxels in the bending energy (of a
        cubic spline) and the learning rate.

    Returns:
      The control grid, and the similarity before each step.

    Raises:
      InputError: an unknown method or similarity, a lattice of `moving` that does not have that of `fixed` in its
        middle, or `spacing` without a cubic spline.

    Source: instance-specific optimisation, Balakrishnan et al., IEEE Trans. Med. Imaging 2019; velocities, Ashburner,
    NeuroImage 2007; both directions, Avants et al., Medical Image Analysis 2008.
    """
    for name, value, known in (("method", method, METHODS), ("similarity", similarity, SIMILARITIES)):
        check_known(name, value, known)
    shape, unit = fixed.shape[1:4], 1.0 if spacing is None else spacing
    longer = [long - size for long, size in zip(moving.shape[1:4], shape, strict=True)]
    if any(more < 0 or more % 2 for more in longer):
        raise InputError(f"moving, {moving.shape[1:4]} voxels, is not {shape} with as many more at either end of axes")
    margin = [more // 2 for more in longer]
    within = moving[:, *(slice(start, start + size) for start, size in zip(margin, shape, strict=True))]
    options = {"window": WINDOW} if similarity == "lncc" else {}
    start = interpolate(control_grid, shape, method=interpolator)

    def loss(grid):
        field = interpolate(grid, shape, method=interpolator)
        displacement = field if method == "grid" else flow(grid, shape, method=interpolator)
        warped = warp(moving, displacement, origin=margin)
        dissimilarity = SIMILARITIES[similarity](fixed, warped, mask=mask, **options)
        if label_maps is not None:
            # Probabilities are smooth: every other voxel an axis tells their overlap, at an eighth of the cost.
            sparse = (slice(None), *[slice(None, None, STRIDE)] * 3)
            warped_maps = warp(label_maps[1], displacement[sparse], origin=margin, stride=STRIDE)
            seen = None if mask is None else mask[sparse]
            dissimilarity += overlap * soft_dice_of_probabilities(label_maps[0][sparse], warped_maps, mask=seen)
        if method == "symmetric":
            back = warp(fixed, flow(-grid, shape, method=interpolator))
            dissimilarity = (dissimilarity + SIMILARITIES[similarity](within, back, mask=mask, **options)) / 2
        change, field = (grid - control_grid, field - start) if from_start else (grid, field)
        penalty = bending * bending_energy_of_map(field, change, interpolator, spacing=spacing)
        if folding is not None:
            penalty += folding * folding_penalty(displacement, grid if method == "grid" else None, interpolator)
        return dissimilarity + penalty, dissimilarity

    found, history = descend(
        lambda scaled: loss(scaled / unit), control_grid * unit, steps=steps, learning_rate=learning_rate
    )
    return found / unit, history


def flow(
    control_grid: Float[Array, "N gx gy gz 3"], shape: tuple[int, int, int], *, method: str = "bspline"
) -> Float[Array, "N X Y Z 3"]:
    """Displacement (voxels) at time 1 of the flow of the stationary velocity that a control grid stands for.

    Integrated on a lattice of half the resolution with the same corners, by scaling and squaring; `-control_grid` has
    the inverse.

    Source: Arsigny et al., MICCAI 2006.
    """
    half = half_lattice(shape)
    steps = jnp.maximum(jnp.asarray(shape) - 1, 1) / jnp.maximum(jnp.asarray(half) - 1, 1)
    displacement = integrate(interpolate(control_grid / steps, half, method=method), steps=SQUARINGS)
    return interpolate(displacement * steps, shape)


def refine(
    control_grid: Float[Array, "N gx gy gz 3"],
    fixed: Float[Array, "N X Y Z 1"],
    moving: Float[Array, "N x y z 1"],
    **options,
) -> Float[Array, "N gx gy gz 3"]:
    """The control grid (voxels) that `refine_recorded` finds near the start; the options and their source are there."""
    return refine_recorded(control_grid, fixed, moving, from_start=True, **options)[0]


def descend(
    loss: Callable, start: PyTree[Float[Array, "..."]], *, steps: int, learning_rate: float | Float[Array, ""]
) -> tuple[PyTree[Float[Array, "..."]], Float[Array, "steps ..."]]:
    """Adam with a step size that falls to 0 along a cosine.

    Adam's steps are as long for a gradient of mere rounding as for any other: it would leave a minimum where it began.

    Args:
      loss: from parameters to (losses, what is to be recorded). One loss, or `[N]` of cases that share nothing, which
        are the first axis of the parameters.
      start: the parameters.
      steps: how many; static under jit.
      learning_rate: of the first step.

    Returns:
      The parameters of least loss before a step, or after the last step if it began with those; and what was recorded
      before each step.

    Source: Kingma & Ba, ICLR 2015; the cosine, Loshchilov & Hutter, ICLR 2017.
    """
    import optax  # Here, since whoever finds the program ready needs none of it.

    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, max(steps, 1)))

    def total(parameters):
        losses, recorded = loss(parameters)
        return jnp.sum(losses), (losses, recorded)

    def where(chosen, parameters, others):
        return jax.tree.map(
            lambda one, other: jnp.where(chosen.reshape(chosen.shape + (1,) * (one.ndim - chosen.ndim)), one, other),
            parameters,
            others,
        )

    def step(carried, _):
        parameters, state, best, least, _ = carried
        gradient, (losses, recorded) = jax.grad(total, has_aux=True)(parameters)
        better = losses < least
        best, least = where(better, parameters, best), jnp.where(better, losses, least)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(parameters, updates), state, best, least, better), recorded

    losses = jax.eval_shape(loss, start)[0]
    first = start, optimizer.init(start), start, jnp.full(losses.shape, jnp.inf), jnp.zeros(losses.shape, bool)
    (last, _, best, _, better), history = jax.lax.scan(step, first, length=steps)
    return where(better, last, best), history
