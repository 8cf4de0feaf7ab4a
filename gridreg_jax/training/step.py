"""The training step, data parallel over all devices of all processes: the only place that knows of `pmap`."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from flax.core import freeze

from gridreg_jax import rng
from gridreg_jax.augment import augment, foreground_points
from gridreg_jax.errors import InputError
from gridreg_jax.losses import SIMILARITIES
from gridreg_jax.measure import GridSize, candidates
from gridreg_jax.memory import bytes_held, bytes_needed, check_memory, return_freed_memory
from gridreg_jax.models import Prediction, build
from gridreg_jax.models.layers import CONVOLUTION
from gridreg_jax.programs import compiler_options, stored
from gridreg_jax.training.objective import objective
from gridreg_jax.training.optimizer import build_optimizer

AXIS = "devices"


@struct.dataclass
class TrainState:
    """All that a training run remembers; everything random follows from the seed and `step`."""

    # Any, since shapes and shardings take the place of arrays when a state is restored.
    step: Any
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Run:
    """What a config builds: the model, its optimiser, and states of them."""

    model: nn.Module
    optimizer: optax.GradientTransformation
    shape: tuple[int, int, int]
    grid_size: GridSize
    seed: int
    batch_size: int

    def init_state(self) -> TrainState:
        """State at step 0, on every device that shares a batch."""
        # Replicated from the start: a state on one device and one on all would compile the step twice.
        return jax.jit(self._init, out_shardings=self.replicated)()

    @property
    def replicated(self) -> jax.sharding.NamedSharding:
        """Sharding of a state: the same on every device that shares a batch."""
        return jax.sharding.NamedSharding(_mesh(self.batch_size), jax.sharding.PartitionSpec())

    def state_shapes(self, sharding: jax.sharding.Sharding) -> TrainState:
        """Shapes, types and the given sharding of a state, for restoring one."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), jax.eval_shape(self._init)
        )

    def _init(self) -> TrainState:
        # Only shapes go in: the parameters are drawn, and the network itself is neither compiled nor run.
        image = jax.ShapeDtypeStruct((1, *self.shape, 1), jnp.float32)
        params = self.model.lazy_init(rng.key(self.seed, "model"), image, image, grid_size=self.grid_size)
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params))


def build_run(config: dict) -> Run:
    """Model and optimiser of a config (a plain dict, as checkpoints store it).

    Raises:
      InputError: an unknown model, model field or optimiser.
    """
    return Run(
        model=build(**config["model"]),
        optimizer=build_optimizer(**config["optimizer"], steps=config["steps"]),
        shape=tuple(config["data"]["shape"]),
        grid_size=candidates(config["grid_sizes"])[0],
        seed=config["seed"],
        batch_size=config["batch_size"],
    )


def sharing(batch_size: int) -> list[jax.Device]:
    """The devices that share a batch: those of all processes; of a single process, as many as can have equal parts.

    Raises:
      InputError: an empty batch, or one that the devices of several processes do not divide.
    """
    devices = jax.devices()
    if jax.process_count() == 1 and batch_size >= 1:
        return devices[: max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)]
    if batch_size < 1 or batch_size % len(devices):
        above = max(len(devices), -(-batch_size // len(devices)) * len(devices))
        raise InputError(f"batch_size {batch_size} cannot be split over {len(devices)} devices; {above} would fit")
    return devices


def _mesh(batch_size: int) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(sharing(batch_size)), (AXIS,))


def shard(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's part of a batch, split over the devices: `[N, ...]` to `[devices, N of a device, ...]`."""
    mesh = _mesh(len(next(iter(batch.values()))) * jax.process_count())
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
    return {
        name: jax.make_array_from_process_local_data(
            split, array.reshape(len(mesh.local_devices), -1, *array.shape[1:])
        )
        for name, array in batch.items()
    }


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """`step(state, batch, grid_size) -> (state, metrics)`; it consumes `state`. Once compiled, `step(state, batch)`.

    `batch` is sharded (`shard`), `grid_size` static; metrics are means over the whole batch. Of its three programs only
    one knows of the grid size, and so is compiled once for each.

    Attributes:
      change: `(state.step, batch) -> batch`, what augmentation makes of it; None: nothing.
      gradient: `(state.params, state.step, batch, grid_size) -> (gradient, metrics)`.
      update: `(state, gradient) -> state`, the optimiser's.
    """

    change: Callable | None
    gradient: Callable
    update: Callable

    def __call__(self, state: TrainState, batch: dict[str, jax.Array], *grid_size: GridSize):
        if self.change:
            batch = self.change(state.step, batch)
        gradient, metrics = self.gradient(state.params, state.step, batch, *grid_size)
        return self.update(state, gradient), metrics


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    loss: dict,
    augmentation: dict,
    remat: bool = False,
) -> TrainStep:
    """The training step of a model.

    Random streams that the model names in `example_streams` get a key for each example, so that noise does not depend
    on the number of devices.

    Args:
      loss: arguments of `objective`.
      augmentation: arguments of `augment`, and `ramp`: over how many steps its spatial changes grow to their size.
      remat: keep only what the network's convolutions gave, and compute the rest of it again for the gradient, which
        takes less memory and more time.
    """
    strengths = {name: value for name, value in augmentation.items() if name != "ramp"}
    ramp = max(1, augmentation.get("ramp", 0))
    used = [SIMILARITIES[loss[name]] for name in ("similarity", "grid_similarity") if name in loss]
    # Of what comes from elsewhere no program is kept: nobody would see that it changes.
    own = all(similarity.__module__.startswith("gridreg_jax.") for similarity in used)
    loss_gradient = _loss_gradient if own else _loss_gradient.__wrapped__

    def example_keys(stream: str, step: jax.Array, local: int) -> jax.Array:
        # A key an example, by its place in the whole batch: the same however many devices share it.
        keys = jax.random.split(rng.key(seed, stream, step), local * jax.lax.axis_size(AXIS))
        return jax.lax.dynamic_slice_in_dim(keys, jax.lax.axis_index(AXIS) * local, local)

    def change(step: jax.Array, batch: dict[str, jax.Array]):
        local = len(batch["fixed"])
        if loss.get("keypoints"):
            # The same in every step: the loop gives one subject alone.
            points = foreground_points(rng.key(seed, "keypoints"), batch["fixed"][0], model.keypoints)
            batch = batch | {"points": jnp.broadcast_to(points, (local, *points.shape))}
        growth = jnp.minimum(1.0, (step + 1) / ramp)
        return augment(batch, example_keys("augmentation", step, local), **strengths, growth=growth)

    def gradient(params, step: jax.Array, batch: dict[str, jax.Array], grid_size: GridSize):
        example_streams = getattr(model, "example_streams", ())
        keys = {name: example_keys(name, step, len(batch["fixed"])) for name in ("posterior", *example_streams)}
        keys["iterations"] = rng.key(seed, "iterations", step)
        found = loss_gradient(params, batch, keys, model=model, grid_size=grid_size, loss=freeze(loss), remat=remat)
        return jax.lax.pmean(found, AXIS)

    def update(state: TrainState, gradient) -> TrainState:
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)

    changes = any(strengths.values()) or loss.get("keypoints")
    return TrainStep(
        change=jax.pmap(change, axis_name=AXIS, in_axes=(None, 0)) if changes else None,
        gradient=jax.pmap(
            gradient,
            axis_name=AXIS,
            in_axes=(None, None, 0, None),
            out_axes=None,
            static_broadcasted_argnums=(3,),
        ),
        update=jax.jit(update, donate_argnums=(0,)),
    )


@functools.partial(stored, static_argnames=("model", "grid_size", "loss", "remat"))
def _loss_gradient(params, batch: dict[str, jax.Array], keys: dict[str, jax.Array], *, model, grid_size, loss, remat):
    """Gradient of the mean loss of a device's examples, and the metrics: nearly all of what is traced of a step.

    Args:
      keys: "posterior" and those of the model's `example_streams`: one an example; "iterations": one for all.
    """
    streams = {"iterations": keys["iterations"]}
    example_streams = {name: keys[name] for name in getattr(model, "example_streams", ())}

    def predict(params):
        def run(params, fixed, moving, keys):
            return model.apply(params, fixed, moving, grid_size=grid_size, train=True, rngs=streams | keys)

        if remat:
            run = jax.checkpoint(run, policy=jax.checkpoint_policies.save_only_these_names(CONVOLUTION))
        if not example_streams:
            return run(params, batch["fixed"], batch["moving"], {})
        # One example at a time, as far as the model can see, so that each has noise of its own.
        one = jax.vmap(lambda fixed, moving, keys: vars(run(params, fixed[None], moving[None], keys)))
        found = one(batch["fixed"], batch["moving"], example_streams)
        return Prediction(**jax.tree.map(lambda leaf: leaf[:, 0], found))

    def mean_loss(params):
        total, terms = objective(predict(params), batch, **loss, keys=keys["posterior"])
        return total.mean(), {name: value.mean() for name, value in terms.items()}

    (total, terms), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params)
    return gradient, {"loss": total, **terms}


def compile_steps(
    step: TrainStep, state: TrainState, batch: dict[str, jax.Array], grid_sizes: Iterable[GridSize]
) -> tuple[dict[GridSize, TrainStep], int]:
    """The step compiled for every grid size, before the first one runs.

    Args:
      state, batch: of the shapes that steps will have; `batch` sharded.

    Returns:
      `{grid_size: step(state, batch)}`, compiled, and the largest memory (bytes) that a device needs for a step, 0
      where the platform does not tell.

    Raises:
      InputError: more memory than there is.
    """
    options, changed = compiler_options(), batch
    # What a step keeps beside what the gradient's program needs: the optimiser's state, and the batch as it was.
    beside = bytes_held(state.opt_state)
    change = None
    if step.change:
        change = step.change.lower(state.step, batch).compile(options)
        changed = change(state.step, batch)
        beside += bytes_held(batch)
    # Compiled one after the other, since XLA uses all cores for one program, and takes more than a gigabyte while it
    # does; but traced meanwhile, which is Python.
    with ThreadPoolExecutor(max_workers=1) as compiler:
        compiling = {
            grid_size: compiler.submit(
                step.gradient.lower(state.params, state.step, changed, grid_size).compile, options
            )
            for grid_size in grid_sizes
        }
        # A gradient is like the parameters.
        updating = compiler.submit(step.update.lower(state, state.params).compile, options)
    gradients = {grid_size: program.result() for grid_size, program in compiling.items()}
    update = updating.result()
    del changed
    # What tracing and compiling leave behind, 100 MiB and more, would add to what the steps take.
    jax.clear_caches()
    return_freed_memory()
    needs = {grid_size: bytes_needed(gradient) for grid_size, gradient in gradients.items()}
    largest = max(needs, key=needs.get)
    needed = needs[largest] and beside + needs[largest]
    check_memory(needed, "a step", largest, "batch_size", held=bytes_held((state, batch)))
    return {grid_size: TrainStep(change, gradient, update) for grid_size, gradient in gradients.items()}, needed
