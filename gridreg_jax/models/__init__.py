"""The models, by name."""


from flax import linen as nn

from gridreg_jax.errors import check_known
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
    check_known("model", name, MODELS)
    model = MODELS[name]
    for field in fields:
        check_known(f"field of the model {name!r}", field, _fields(model))
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
