"""Optimisers by name."""

import jax
import optax

from gridreg_jax.errors import check_known

# What the models call the layers that give their answer.
HEADS = {"head", "variance_head", "flow", "log_variance"}


def muon(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Momentum whose matrices are made orthogonal: every direction of a kernel learns at one pace, however noisy.

    So are the kernels (those of convolutions as matrices from what they see to their features) except a network's
    heads; those and whatever is no kernel are left to Adam (with Nesterov's momentum). Updates are as large as Adam's,
    so that a rate suits both.

    Source: Jordan et al., 2024, "Muon: an optimizer for hidden layers"; the size of updates: Liu et al., 2025, "Muon is
    scalable for LLM training".
    """
    return optax.contrib.muon(learning_rate, muon_weight_dimension_numbers=_matrices, consistent_rms=0.2)


def _matrices(params):
    """Which axes of a kernel are a matrix's rows and columns; None for what is not made orthogonal."""

    def of(path, leaf):
        names = [entry.key for entry in path]
        if names[-1] != "kernel" or HEADS.intersection(names):
            return None
        last = leaf.ndim - 1
        # Of a scan, which has a kernel for each of its steps, every one is a matrix by itself.
        rows = range(last) if leaf.ndim == 5 else (last - 1,)
        return optax.contrib.MuonDimensionNumbers(tuple(rows), (last,))

    return jax.tree_util.tree_map_with_path(of, params)


OPTIMIZERS = {"adam": optax.adam, "adamax": optax.adamax, "amsgrad": optax.amsgrad, "muon": muon, "sgd": optax.sgd}


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
    check_known("optimizer.name", name, OPTIMIZERS)
    rate = learning_rate
    if decay and power:
        rate = optax.polynomial_schedule(learning_rate, 0.0, power, steps)
    elif decay:
        warmup = max(1, steps // 50)
        rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))
    parts = [optax.clip_by_global_norm(clip)] if clip else []
    return optax.chain(*parts, OPTIMIZERS[name](rate))
