"""What a run has trained, for those who use it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from flax.errors import FlaxError

from gridreg_jax.errors import InputError
from gridreg_jax.measure import GridSize, candidates
from gridreg_jax.training.checkpoint import Checkpoints
from gridreg_jax.training.step import build_run


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
      model: the network.
      params: its parameters, on one device.
      config: of the run.
      grid_size: control points an axis that validation chose; before the first validation, the coarsest of the config;
        None for a model that predicts no control grid.
    """

    model: nn.Module
    params: Any
    config: dict
    grid_size: GridSize


@contextlib.contextmanager
def in_use(workdir: str | Path) -> Iterator[None]:
    """Around the use of a run's network: raises `InputError` where the run's parameters are not those of its model."""
    try:
        yield
    except FlaxError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{workdir}: parameters of another version, which do not fit the model ({reason})") from error


def load_trained(workdir: str | Path, *, notify: Callable[[str], None]) -> Trained:
    """The best checkpoint of a run that can be read; to be used within `in_use`.

    Args:
      workdir: of a run of `train.py`.
      notify: told, in a line, of every damaged checkpoint that was passed over.

    Raises:
      InputError: no run is there, it has no checkpoint yet, or none can be read.
    """
    folder = Path(workdir).resolve() / "checkpoints"
    if not folder.is_dir():
        raise InputError(f"{workdir}: holds no run (no folder 'checkpoints'); give the workdir of a run of train.py")
    made = []
    for path in sorted(folder.iterdir()):
        with contextlib.suppress(FileNotFoundError):  # a training that goes on removes the older ones
            made.append((path, path.stat().st_mtime_ns))
    return _loaded(workdir, notify, tuple(made))


# Who registers many pairs with one network would spend a third of the time on reading it.
@functools.lru_cache(maxsize=1)
def _loaded(workdir: str | Path, notify: Callable[[str], None], made: tuple[tuple[Path, int], ...]) -> Trained:
    """As `load_trained`, of a run that has these checkpoints, made at these times."""
    with Checkpoints(workdir) as checkpoints:
        best = checkpoints.best_step()
        if best is None:
            raise InputError(f"{workdir}: the run has no checkpoint yet")
        order = [best] + [step for step in reversed(checkpoints.steps()) if step != best]
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        _, params, config, chosen = checkpoints.restore_params(device, order=order, notify=notify)
    grid_size = candidates(config["grid_sizes"])[0]
    if chosen and chosen["grid_size"]:
        grid_size = tuple(chosen["grid_size"])
    return Trained(build_run(config).model, params, config, grid_size)
