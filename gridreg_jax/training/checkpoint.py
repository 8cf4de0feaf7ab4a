"""Checkpoints of a run, in `workdir/checkpoints`: the only place that knows of Orbax."""

import contextlib
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from gridreg_jax.errors import InputError

# Two, so that a damaged latest checkpoint leaves one to fall back to.
_KEEP_LATEST = 2


class Checkpoints:
    """The latest checkpoints and the best one, each with the run's config and what validation chose.

    Use as a context manager. The best checkpoint is the one saved with the highest `score`.
    """

    def __init__(self, workdir: str | Path):
        policies = ocp.training.preservation_policies
        self._folder = Path(workdir).resolve() / "checkpoints"
        self._damaged: set[int] = set()
        _drop_damaged_scores(self._folder)
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(_KEEP_LATEST),
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics["score"], n=1, keep_checkpoints_without_metrics=False
                    ),
                ]
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._checkpointer.close()

    def save(self, step: int, state: Any, *, config: dict, chosen: dict | None, score: float | None) -> None:
        """Save a state, on disk when this returns; a readable checkpoint of this step that is there already stays.

        Args:
          config: JSON-like, its sequences tuples; the model can be rebuilt from it.
          chosen: what validation found (`grid_size`, scores), None before the first validation.
          score: what makes a checkpoint the best, higher is better; None: never the best.

        Raises:
          InputError: it cannot be written.
        """
        if step in self.steps() and step not in self._damaged:
            return
        try:
            self._checkpointer.save(
                step,
                state,
                force=True,  # also when a later step has a checkpoint, a damaged one
                overwrite=True,
                metrics=None if score is None else {"score": score},
                custom_metadata={"config": json.dumps(config), "chosen": json.dumps(chosen)},
            )
        except (OSError, ValueError) as error:  # of a full disk, Orbax makes a ValueError
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{self._folder}: the checkpoint of step {step} cannot be written ({reason})") from error
        self._damaged.discard(step)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def best_step(self) -> int | None:
        """Step of the checkpoint with the highest score (the earliest of equals), the latest if none has one."""
        scored = [(c.metrics["score"], -c.step) for c in self._checkpointer.checkpoints if c.metrics]
        if scored:
            return -max(scored)[1]
        return max(self.steps(), default=None)

    def restore(
        self, state_shapes: Callable[[dict], Any], *, order: list[int], notify: Callable[[str], None]
    ) -> tuple[int, Any, dict, dict | None]:
        """The first checkpoint of `order` that can be read: its step, state, config and validation choice.

        Args:
          state_shapes: from the config that was saved to the state's shapes, types and shardings.
          notify: told, in a line, of every damaged checkpoint that was passed over.

        Raises:
          InputError: none can be read.
        """
        return self._first(lambda step, config, _: self._checkpointer.load(step, state_shapes(config)), order, notify)

    def restore_params(
        self, sharding: jax.sharding.Sharding, *, order: list[int], notify: Callable[[str], None]
    ) -> tuple[int, Any, dict, dict | None]:
        """As `restore`, but the state's parameters alone, as they were saved: no network has to say what they are."""

        def load(step: int, config: dict, saved: dict):
            wanted = jax.tree.map(lambda leaf: ocp.PLACEHOLDER, saved)
            wanted["params"] = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), saved["params"]
            )
            return self._checkpointer.load(step, wanted)["params"]

        return self._first(load, order, notify)

    def _read_info(self, step: int) -> tuple[dict, dict | None, Any]:
        """Config, validation choice, and the shapes and types of the state."""
        saved = ocp.metadata(self._folder / str(step))
        config, chosen = (json.loads(saved.custom_metadata[name]) for name in ("config", "chosen"))
        return _with_tuples(config), chosen, saved.metadata

    def _first(self, load: Callable[[int, dict, Any], Any], order: list[int], notify: Callable[[str], None]):
        for step in order:
            try:
                with _interrupts_wait():
                    config, chosen, saved = self._read_info(step)
                    return step, load(step, config, saved), config, chosen
            except InputError:
                raise
            except Exception as error:  # Orbax raises whatever its readers meet in a damaged folder.
                self._damaged.add(step)
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                notify(f"checkpoint {self._folder / str(step)} is damaged and passed over ({reason[:120]})")
        raise InputError(f"{self._folder}: no checkpoint can be read")


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Inside, Ctrl-C waits for the end: Orbax would take it for damage of what it reads."""
    asked = []
    try:
        previous = signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    except ValueError:  # not in the main thread, where none arrives
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if asked:
            signal.raise_signal(signal.SIGINT)


def _with_tuples(value):
    """What JSON returns, with the tuples that a config had in place of lists."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _drop_damaged_scores(folder: Path) -> None:
    """Remove scores that cannot be read: Orbax reads those of all checkpoints at once, and would open none."""
    for path in folder.glob("*/metrics/metrics"):
        try:
            json.loads(path.read_text())
        except ValueError:
            path.unlink()
