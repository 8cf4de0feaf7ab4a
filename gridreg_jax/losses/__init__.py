"""Losses: every one minimises and returns one value a case, `[N]`."""

from gridreg_jax.losses.overlap import (
    MOST_WARPED_LABELS,
    one_hot,
    segmentation_loss,
    soft_dice,
    soft_dice_of_maps,
    soft_dice_of_probabilities,
)
from gridreg_jax.losses.regularity import (
    bending_energy,
    bending_energy_of_map,
    diffusion_energy,
    diffusion_energy_of_map,
    folding_penalty,
    kl_to_smooth,
)
from gridreg_jax.losses.similarity import (
    lncc,
    mind,
    mse,
    ncc,
    nmi,
    normalised_residual,
    ssim,
    uncertainty_weighted_mse,
)

SIMILARITIES = {"mse": mse, "lncc": lncc, "ncc": ncc, "nmi": nmi, "mind": mind, "ssim": ssim}

__all__ = [
    "MOST_WARPED_LABELS",
    "SIMILARITIES",
    "bending_energy",
    "bending_energy_of_map",
    "diffusion_energy",
    "diffusion_energy_of_map",
    "folding_penalty",
    "kl_to_smooth",
    "lncc",
    "mind",
    "mse",
    "ncc",
    "nmi",
    "normalised_residual",
    "one_hot",
    "segmentation_loss",
    "soft_dice",
    "soft_dice_of_maps",
    "soft_dice_of_probabilities",
    "ssim",
    "uncertainty_weighted_mse",
]
