"""The models, by name."""

import difflib

from flax import linen as nn

from gridreg_jax.errors import InputError
from gridreg_jax.models.gridreg import GridReg
from gridreg_jax.models.keymorph import KeyMorph
from gridreg_jax.models.lightcrcf import LightCRCF
from gridreg_jax.models.pointwise import PointwiseGridReg
from gridreg_jax.models.prediction import Prediction
from gridreg_jax.models.transmorph import TransMorph
from gridreg_jax.models.voxelmorph import VoxelMorph

MODELS = {
    "gridreg": GridReg,
    "gridreg_pointwise": PointwiseGridReg,
    "keymorph": KeyMorph,
    "lightcrcf": LightCRCF,
    "transmorph": TransMorph,
    "voxelmorph": VoxelMorph,
}


def build(name: str, **fields):
    """A model by name, with the given fields; e.g. `build("gridreg", levels=5, width=16)`.

    Raises:
      InputError: unknown name or field.
    """
    if name not in MODELS:
        raise InputError(f"unknown model {name!r}: known are {', '.join(MODELS)}")
    model = MODELS[name]
    known = _fields(model)
    for field in fields:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f": it has {', '.join(known)}"
            raise InputError(f"model {name!r} has no field {field!r}{hint}")
    return model(**fields)


def describe(model: nn.Module) -> dict:
    """Name and every field of a model, defaults included: what `build` needs to make the same one again."""
    name = next(name for name, known in MODELS.items() if type(model) is known)
    return {"name": name} | {field: getattr(model, field) for field in _fields(model)}


def has_control_grid(model: nn.Module) -> bool:
    """Whether a model predicts a control grid, of the size that it is asked for: then it has a field `interpolator`."""
    return "interpolator" in _fields(model)


def _fields(model) -> list[str]:
    return [field for field in model.__dataclass_fields__ if field not in ("parent", "name")]


__all__ = ["MODELS", "Prediction", "build", "describe", "has_control_grid"]
