"""Optimisers by name."""

import optax

from gridreg_jax.errors import InputError

OPTIMIZERS = {"adam": optax.adam, "adamax": optax.adamax, "amsgrad": optax.amsgrad, "sgd": optax.sgd}


def build_optimizer(
    *,
    name: str = "adam",
    learning_rate: float = 1e-4,
    steps: int,
    decay: bool = False,
    power: float = 0.0,
    clip: float = 0.0,
) -> optax.GradientTransformation:
    """An optimiser.

    Args:
      name: in `OPTIMIZERS`.
      learning_rate: the paper's is 1e-4, constant.
      steps: length of the training, for the decay.
      decay: let the learning rate fall to 0, along a cosine after a linear rise over the first 2 %.
      power: with `decay`, if not 0: as `(1 - step / steps)**power` instead (TransMorph's is 0.9).
      clip: largest global norm of the gradient; 0 for none.

    Raises:
      InputError: unknown name.
    """
    if name not in OPTIMIZERS:
        raise InputError(f"optimizer.name: {name!r} is not known; known are {', '.join(OPTIMIZERS)}")
    rate = learning_rate
    if decay and power:
        rate = optax.polynomial_schedule(learning_rate, 0.0, power, steps)
    elif decay:
        warmup = max(1, steps // 50)
        rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))
    parts = [optax.clip_by_global_norm(clip)] if clip else []
    return optax.chain(*parts, OPTIMIZERS[name](rate))
