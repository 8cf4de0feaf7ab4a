"""What training minimises: similarity at image and grid level, overlap, and smoothness (paper, section 3.3)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gridreg_jax.errors import InputError
from gridreg_jax.losses import (
    MOST_WARPED_LABELS,
    SIMILARITIES,
    bending_energy_of_map,
    diffusion_energy,
    diffusion_energy_of_map,
    folding_penalty,
    kl_to_smooth,
    one_hot,
    segmentation_loss,
    soft_dice,
    soft_dice_of_maps,
    uncertainty_weighted_mse,
)
from gridreg_jax.models import Prediction
from gridreg_jax.transforms import bspline
from gridreg_jax.transforms.interpolation import control_positions, interpolate, interpolate_at_controls
from gridreg_jax.transforms.warp import sample, warp, warp_by_grid


def objective(
    prediction: Prediction,
    batch: dict[str, jax.Array],
    *,
    interpolator: str,
    num_labels: int,
    similarity: str = "mse",
    grid_similarity: str = "mse",
    image: float = 1.0,
    grid: float = 1.0,
    dice: float = 0.0,
    bending: float = 1.0,
    folding: float = 0.0,
    elastic: tuple[float, float] = (0.0, 0.0),
    gradient: float = 0.0,
    kl: float = 0.0,
    kl_precision: float = 10.0,
    keypoints: float = 0.0,
    segmentation: float = 0.0,
    uncertainty: float = 0.0,
    penalty: float = 1.0,
    samples: int = 1,
    keys: jax.Array | None = None,
) -> tuple[Float[Array, " N"], dict[str, Float[Array, " N"]]]:
    """Weighted sum of the terms, and the terms themselves, one value a case.

    With a Bayesian head the similarities are means over maps drawn from the predicted posterior, by reparameterisation
    `u_s = mean + sigma * noise_s` (paper, section 3.2), beside the uncertainty-weighted similarity of the mean map.

    Of a model that predicts both directions, the image term is the mean of fixed against warped moving and of moving
    against warped fixed (Balakrishnan et al., IEEE TMI 2019, and its authors' code).

    Args:
      batch: `fixed`, `moving` `[N, X, Y, Z, 1]`; with `dice`, also compact `fixed_labels`, `moving_labels`.
      interpolator: of the control grid; the cubic spline's bending energy is taken in closed form.
      num_labels: labels that are scored.
      similarity, grid_similarity: names in `losses.SIMILARITIES`, for whole images and for their values at the control
        points.
      image, grid, dice, bending, folding, gradient, kl: weights; a term of weight 0 is not computed. `bending` is in
        voxel units: the paper's 2e5, for displacements in half volumes, is `2e5 (2 / X)^2` here, 49 at 128 voxels an
        axis. `gradient` is of the mean squared forward difference, as in VoxelMorph: of the velocity if there is one,
        else of the displacement, and of a cubic spline in closed form. VoxelMorph's code doubles it for a velocity at
        half resolution; here the weight does.
      elastic: the Lame constants mu and lambda of the linear elastic energy of a cubic spline (voxels); 0, 0: none.
      keypoints: weight of the mean squared distance, in half lattices, of predicted keypoints from `fixed_points` and
        `moving_points` `[N, K, 3]` of the batch (voxels).
      segmentation: weight of a segmenter's cross-entropy and overlap with `fixed_labels` and `moving_labels`.
      kl_precision: of the prior that `kl` compares the velocity's posterior to (see `losses.kl_to_smooth`).
      uncertainty: weight of the uncertainty-weighted similarity of a Bayesian head's mean map.
      penalty: in it, of the variance (the paper's lambda_0; 1 is a likelihood).
      samples: maps drawn from the posterior, in pairs on either side of the mean (of an odd number, the last without).
      keys: `[N]`, one an example, for these draws.

    Raises:
      InputError: `kl` without a posterior of the velocity, `keypoints` without those, or `elastic` without a cubic
        spline.
    """
    fixed, moving = batch["fixed"], batch["moving"]
    # What the mean map warps is warped at once.
    maps = one_hot(batch["moving_labels"], num_labels) if dice and num_labels <= MOST_WARPED_LABELS else []
    warped, *warped_maps = _warp(prediction, [moving[..., 0], *maps], interpolator)
    drawn, alike = [prediction], [(fixed, warped[..., None])]
    if prediction.log_variance is not None:
        drawn = _draw(prediction, keys, samples, interpolator)
        alike = [(fixed, _warp(one, [moving[..., 0]], interpolator)[0][..., None]) for one in drawn]
    if prediction.inverse_displacement is not None:
        alike.append((moving, warp(fixed, prediction.inverse_displacement)))
    terms = {}
    if image:
        terms["image"] = _mean(SIMILARITIES[similarity](*pair) for pair in alike)
    if grid and prediction.control_displacement is not None:
        terms["grid"] = _mean(_grid_similarity(one, fixed, moving, interpolator, grid_similarity) for one in drawn)
    if warped_maps:
        terms["dice"] = soft_dice_of_maps(batch["fixed_labels"], warped_maps)
    elif dice:
        labels = batch["fixed_labels"], batch["moving_labels"]
        terms["dice"] = soft_dice(*labels, prediction.displacement, num_labels=num_labels)
    if bending:
        terms["bending"] = bending_energy_of_map(prediction.displacement, prediction.control_grid, interpolator)
    if folding:
        terms["folding"] = folding_penalty(prediction.displacement, prediction.control_grid, interpolator)
    if gradient:
        terms["gradient"] = _diffusion(prediction, interpolator) / 3
    if any(elastic):
        if interpolator != "bspline" or prediction.control_grid is None:
            raise InputError(f"loss.elastic is {elastic}, but the map is no cubic spline")
        mu, lam = elastic
        terms["elastic"] = bspline.elastic_energy(prediction.control_grid, fixed.shape[1:4], mu=mu, lam=lam)
    if kl:
        if prediction.velocity_log_variance is None:
            raise InputError(f"loss.kl is {kl}, but the model predicts no posterior of a velocity")
        terms["kl"] = kl_to_smooth(prediction.velocity, prediction.velocity_log_variance, precision=kl_precision)
    if keypoints:
        if prediction.keypoints is None:
            raise InputError(f"loss.keypoints is {keypoints}, but the model predicts no keypoints")
        terms["keypoints"] = _mean(_keypoint_error(prediction, batch, side) for side in (0, 1))
    if segmentation and prediction.segmentation is not None:
        sides = zip(prediction.segmentation, ("fixed_labels", "moving_labels"), strict=True)
        terms["segmentation"] = _mean(segmentation_loss(logits, batch[name]) for logits, name in sides)
    if uncertainty and prediction.log_variance is not None:
        weighted = uncertainty_weighted_mse(fixed, warped[..., None], prediction.variance, penalty=penalty)
        terms["uncertainty"] = weighted
    weights = dict(image=image, grid=grid, dice=dice, bending=bending, folding=folding, elastic=1.0)
    weights |= dict(gradient=gradient, kl=kl, keypoints=keypoints)
    weights |= dict(segmentation=segmentation, uncertainty=uncertainty)
    return sum(weights[name] * value for name, value in terms.items()), terms


def _mean(values):
    return jnp.mean(jnp.stack(list(values)), axis=0)


def _draw(prediction, keys, samples, interpolator) -> list[Prediction]:
    """Predictions drawn from the posterior of the control grid (paper, section 3.2).

    In pairs on either side of the mean, so that what the noise adds to the gradient cancels to first order.
    """
    mean, deviation = prediction.control_grid, jnp.exp(0.5 * prediction.log_variance)
    half = jax.vmap(lambda key: jax.random.normal(key, ((samples + 1) // 2, *mean.shape[1:])), out_axes=1)(keys)
    drawn = []
    for noise in jnp.concatenate([half, -half])[:samples]:
        control_grid = mean + deviation * noise
        drawn.append(
            Prediction(
                displacement=interpolate(control_grid, prediction.displacement.shape[1:4], method=interpolator),
                control_grid=control_grid,
                control_displacement=interpolate_at_controls(control_grid, method=interpolator),
            )
        )
    return drawn


def _warp(prediction, volumes, interpolator):
    if prediction.control_grid is None:
        return [warp(volume[..., None], prediction.displacement)[..., 0] for volume in volumes]
    return warp_by_grid(volumes, prediction.control_grid, volumes[0].shape[1:], method=interpolator)


def _diffusion(prediction, interpolator):
    if prediction.velocity is not None:
        return diffusion_energy(prediction.velocity)
    return diffusion_energy_of_map(prediction.displacement, prediction.control_grid, interpolator)


def _keypoint_error(prediction, batch, side: int):
    name = ("fixed", "moving")[side]
    half_lattice = (np.array(batch[name].shape[1:4], np.float32) - 1) / 2
    error = (prediction.keypoints[side] - batch[f"{name}_points"]) / half_lattice
    return jnp.mean(error**2, axis=(1, 2))


def _grid_similarity(prediction, fixed, moving, interpolator, similarity):
    """Similarity of the images at the control positions (paper: L_sim at grid level)."""
    axes = [
        control_positions(interpolator, g) * (size - 1)
        for g, size in zip(prediction.control_displacement.shape[1:4], fixed.shape[1:4], strict=True)
    ]
    points = jnp.asarray(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1), jnp.float32)
    fixed_values = jax.vmap(lambda volume: sample(volume, points))(fixed)
    moving_values = jax.vmap(sample)(moving, points + prediction.control_displacement)
    return SIMILARITIES[similarity](fixed_values, moving_values)
