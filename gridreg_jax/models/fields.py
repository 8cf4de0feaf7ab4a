"""What a model's fields may be."""

import math

from flax import linen as nn

from gridreg_jax.errors import InputError


def check_fields(model: nn.Module, least: int, *names: str, most: int | float = math.inf) -> None:
    """Raise `InputError` unless these fields are finite numbers from `least` to `most`, or hold such numbers alone."""
    for name in names:
        value = getattr(model, name)
        if not _lies(value, least, most):
            known = f"{least} or more" if most == math.inf else f"{least} to {most}"
            raise InputError(f"model.{name} is {value}: give {known}{' each' if isinstance(value, tuple) else ''}")


def _lies(value, least: int, most: int | float) -> bool:
    if isinstance(value, tuple):
        return all(_lies(part, least, most) for part in value)
    return least <= value <= most and value < math.inf
