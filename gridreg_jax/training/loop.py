"""Training, from a config to a trained run."""

import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from ml_collections import ConfigDict
from tqdm import tqdm

from gridreg_jax import losses
from gridreg_jax.data.pipeline import Dataset, batches, open_dataset
from gridreg_jax.errors import InputError, check_known
from gridreg_jax.measure import GridSize, candidates, check_fits, make_predict, measure, score, summarise
from gridreg_jax.memory import bytes_held, bytes_needed, check_memory
from gridreg_jax.models import build, describe, has_control_grid
from gridreg_jax.rng import generator
from gridreg_jax.training.checkpoint import Checkpoints
from gridreg_jax.training.step import TrainStep, build_run, compile_steps, make_train_step, shard, sharing
from gridreg_jax.training.trained import load_trained
from gridreg_jax.training.writers import MetricsWriter, SilentWriter
from gridreg_jax.transforms.interpolation import check_grid_size

# Largest share of folded voxels (mean over the validation pairs) of a grid size that validation may prefer.
FOLDING_PERCENT = 0.01
# Parts of a config whose numbers are weights, rates and sizes: none is negative.
SECTIONS = ("loss", "augmentation", "optimizer", "refinement")
# Steps after which several processes ask one another whether to stop.
ASK_EVERY = 10


def fit(config: ConfigDict, workdir: str | Path) -> bool:
    """Train what a config describes, in a folder.

    A folder that holds a run of the same model is resumed where it stopped:
      1. the latest checkpoint that can be read gives the state and what validation chose;
      2. `metrics.jsonl` is cut after that step;
      3. batches, grid sizes and augmentation go on from that step: they are functions of the seed and the step.
    Ctrl-C (or SIGTERM) ends the running step, saves and returns.

    Of several processes (`jax.distributed`), each loads its part of every batch, and the first one writes and reports.
    All of them validate, so that none waits for another.

    Args:
      config: see `configs/default.py`.
      workdir: takes `checkpoints/`, `metrics.jsonl` and `events/`.

    Returns:
      True when the run is complete; False when it was stopped before its end.

    Raises:
      InputError: something in the config, the data or the folder is not as it should be.
      FloatingPointError: the loss or the parameters are not finite; the message names the step. No such state is saved.
    """
    config, workdir = config.to_dict(), Path(workdir)
    leads = jax.process_index() == 0
    notify = tqdm.write if leads else lambda line: None
    check_config(config)
    run = build_run(config)
    used = len(sharing(config["batch_size"]))
    if used < jax.device_count():
        notify(f"batch_size {config['batch_size']} can be shared by {used} of the {jax.device_count()} devices")
    dataset = open_dataset(**config["data"], seed=config["seed"], notify=notify)
    segments = getattr(run.model, "segmenter", 0)
    for field, used in (("loss.dice", config["loss"]["dice"]), ("model.segmenter", segments)):
        if used and not dataset.has_labels:
            raise InputError(f"{field} is on, but not every image has labels: list them, or set --config.{field}=0")
    if segments:
        run = dataclasses.replace(run, model=run.model.clone(labels=len(dataset.label_values)))
    # All fields, so that a run can be rebuilt when a default has changed.
    config["model"] = describe(run.model)
    interpolator = getattr(run.model, "interpolator", "")
    loss = config["loss"] | {"interpolator": interpolator, "num_labels": len(dataset.label_values)}
    train_step = make_train_step(
        run.model,
        run.optimizer,
        seed=config["seed"],
        loss=loss,
        augmentation=config["augmentation"],
        remat=config["remat"],
    )
    if loss["keypoints"]:
        dataset = dataset.of_one_subject()
    # What is evaluated later is validated: a grid that folds, or is too coarse, without it may be the best one with it.
    predict = make_predict(run.model, refinement=config["refinement"])

    if not workdir.exists():
        run.state_shapes(run.replicated)  # an impossible model leaves no folder behind
    workdir.mkdir(parents=True, exist_ok=True)
    with Checkpoints(workdir) as checkpoints, _stop_requested() as stopped:
        start, state, chosen = _initial_state(run, config, checkpoints, notify)
        # A terminal shows a moving bar; a log file takes a line now and then.
        look = dict(unit="step", smoothing=0.05, dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 30)
        bar = tqdm(total=config["steps"], initial=start, disable=not leads, **look)
        with MetricsWriter(workdir, start=start) if leads else SilentWriter() as writer, bar as progress:
            mine = (jax.process_index(), jax.process_count())
            options = dict(batch_size=config["batch_size"], part=mine, seed=config["seed"], place=shard)
            stream = batches(dataset, **options, start=start, stop=config["steps"])
            steps = None  # compiled with the first batch
            waited = spent = 0.0  # seconds: for data, and in all
            pending = None  # the step in flight: at most one, its metrics are collected after the next is dispatched
            step, began = start, time.perf_counter()
            while step < config["steps"] and not stopped(step):
                grid_size = draw_grid_size(config["grid_sizes"], seed=config["seed"], step=step)
                asked = time.perf_counter()
                batch = next(stream)
                waiting = time.perf_counter() - asked
                if steps is None:
                    steps = _compile(train_step, state, batch, predict, dataset, config["grid_sizes"], notify)
                    began, waiting = time.perf_counter(), 0.0  # the first batch has to be prepared
                state, metrics = steps[grid_size](state, batch)
                step += 1
                if pending:
                    _record(writer, progress, *pending)
                now = time.perf_counter()
                times = {"seconds": now - began, "waiting": waiting}
                pending, began = (step, grid_size, metrics, times), now
                waited, spent = waited + waiting, spent + times["seconds"]
                validates = step % config["val_every"] == 0 or step == config["steps"]
                if validates or step % config["checkpoint_every"] == 0:
                    _record(writer, progress, *pending)
                    pending = None
                    _check_finite(step, state)
                    if validates:
                        chosen = validate(predict, state.params, dataset, config["grid_sizes"])
                        writer.write(step, "val", chosen)
                        notify(_validation_line(step, chosen))
                    _save(checkpoints, step, state, config, chosen, scored=validates)
                    began = time.perf_counter()
            if pending:
                _record(writer, progress, *pending)
        if spent:
            notify(f"waited for data {100 * waited / spent:.1f} % of the time")
        if step < config["steps"]:
            _check_finite(step, state)
            _save(checkpoints, step, state, config, chosen, scored=False)
            notify(f"stopped at step {step} and saved; the same command goes on from there")
            return False
    return True


def check_config(config: dict) -> None:
    """Raise `InputError` for values that no part would accept, before any work is done."""
    sharing(config["batch_size"])
    model = build(**config["model"])
    if not has_control_grid(model):
        for name, value in (("grid_sizes", config["grid_sizes"]), ("refinement.steps", config["refinement"]["steps"])):
            if value:
                raise InputError(
                    f"{name} is {value}, but the model {config['model']['name']!r} predicts no control grid"
                )
    elif not config["grid_sizes"]:
        raise InputError("grid_sizes is empty: give one size or more, e.g. (5, 8, 10, 15)")
    for size in config["grid_sizes"]:
        if not isinstance(size, int):
            raise InputError(f"grid_sizes must be whole numbers, such as (5, 8), not {size!r}")
        check_grid_size((size,) * 3, model.interpolator)
        check_fits((size,) * 3, config["data"]["shape"])
    for name in ("similarity", "grid_similarity"):
        check_known(f"loss.{name}", config["loss"][name], losses.SIMILARITIES)
    elastic = config["loss"]["elastic"]
    if len(elastic) != 2 or not all(isinstance(value, (int, float)) for value in elastic):
        raise InputError(f"loss.elastic must be two numbers, mu and lambda, not {elastic}")
    if config["loss"]["samples"] < 1:
        raise InputError(f"loss.samples must be 1 or more, not {config['loss']['samples']}")
    if config["loss"]["keypoints"] and not hasattr(model, "keypoints"):
        raise InputError(f"loss.keypoints is on, but the model {config['model']['name']!r} predicts no keypoints")
    if config["loss"]["keypoints"] and config["augmentation"]["elastic"]:
        raise InputError("loss.keypoints follows points through affine changes only: set augmentation.elastic to 0")
    sections = {"": {"seed": config["seed"]}} | {f"{name}.": config[name] for name in SECTIONS}
    for section, values in sections.items():
        for name, value in values.items():
            if isinstance(value, (int, float)) and not value >= 0:  # nor is NaN
                raise InputError(f"{section}{name} must be 0 or more, not {value}")
    if config["augmentation"]["flip"] > 1:
        raise InputError(f"augmentation.flip is a probability, from 0 to 1, not {config['augmentation']['flip']}")
    for name in ("steps", "val_every", "checkpoint_every"):
        if config[name] < 1:
            raise InputError(f"{name} must be 1 or more, not {config[name]}")


def draw_grid_size(sizes: tuple[int, ...], *, seed: int, step: int) -> GridSize:
    """The control grid of a training step, drawn among the entries (paper, section 3.1, adaptive grid sizes)."""
    return (int(generator(seed, "grid size", step).choice(sizes)),) * 3 if sizes else None


def validate(predict: Callable, params, dataset: Dataset, grid_sizes: tuple[int, ...]) -> dict:
    """Score of every grid size on the validation pairs, and the best one (paper, section 3.1).

    A size whose maps fold in more than `FOLDING_PERCENT` of the voxels is chosen only if all do.

    Returns:
      `grid_size` (a triple, the coarsest of equals), its `score`, and `scores` and `folding_percent` by grid size
      ("none", and None for `grid_size`, of a model that predicts no control grid).
    """
    params, summaries = _on_one_device(params), {}
    for size in candidates(grid_sizes):
        rows = [row for row, _ in measure(predict, params, dataset, dataset.pairs["val"], size)]
        summaries[size] = summarise(rows, size)
    scores = {size: score(summary) for size, summary in summaries.items()}
    folding = {size: summary["metrics"]["folding_percent"]["after"] for size, summary in summaries.items()}
    best = max([size for size in scores if folding[size] <= FOLDING_PERCENT] or scores, key=scores.get)
    return {
        "grid_size": best and list(best),
        "score": scores[best],
        "scores": {_points(size): value for size, value in scores.items()},
        "folding_percent": {_points(size): value for size, value in folding.items()},
    }


def _on_one_device(params):
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), params)


def _points(grid_size: GridSize) -> str:
    """A cubic grid by its points an axis."""
    return str(grid_size[0]) if grid_size else "none"


def _initial_state(run, config: dict, checkpoints: Checkpoints, notify: Callable[[str], None]):
    """Step, state and validation choice to begin with: those of the latest readable checkpoint, or a new state."""
    if not checkpoints.steps():
        state = run.init_state()
        if config["start"]:
            state = state.replace(params=_params_of(config["start"], state, run.replicated, notify))
        return 0, state, None

    def shapes(saved: dict):
        # A field that the model did not have then stands at its default.
        there, now = describe(build(**saved["model"])), config["model"]
        differing = sorted(k for k in there.keys() | now.keys() if there.get(k) != now.get(k))
        if differing:
            changes = ", ".join(f"{k}: {there.get(k)} there, {now.get(k)} now" for k in differing)
            raise InputError(f"the workdir holds a run of another model ({changes}); give another --workdir")
        return run.state_shapes(run.replicated)

    step, state, _, chosen = checkpoints.restore(shapes, order=checkpoints.steps()[::-1], notify=notify)
    notify(f"resuming at step {step} of {config['steps']}")
    return step, state, chosen


def _params_of(workdir: str, state, sharding: jax.sharding.Sharding, notify: Callable[[str], None]):
    """Parameters of another run's best checkpoint, for a new state."""
    params = load_trained(workdir, notify=notify).params
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, state.params):
        raise InputError(f"start: the run in {workdir} has a model with other parameters")
    notify(f"starting with the parameters of {workdir}")
    return jax.device_put(jax.device_get(params), sharding)


def _compile(
    train_step: TrainStep, state, batch: dict, predict: Callable, dataset: Dataset, grid_sizes: tuple, notify
) -> dict[GridSize, Callable]:
    """The steps, and what they and the prediction that validates them need in memory, before any of them runs."""
    began = time.perf_counter()
    sizes = candidates(grid_sizes)
    notify("compiling" + (f" for grid sizes {', '.join(str(size[0]) for size in sizes)}" if grid_sizes else ""))
    pair = dataset.arrays(dataset.pairs["val"][:1], known=True)
    predicting = bytes_needed(predict.lower(_on_one_device(state.params), pair, sizes[-1]).compile())
    check_memory(predicting, "a prediction", sizes[-1], held=bytes_held(state.params))
    steps, needed = compile_steps(train_step, state, batch, sizes)
    memory = f"; a step needs {needed / 2**20:.0f} MiB a device, a prediction {predicting / 2**20:.0f}"
    notify(f"compiled in {time.perf_counter() - began:.0f} s{memory if needed else ''}")
    return steps


def _record(writer: MetricsWriter, progress: tqdm, step: int, grid_size, metrics: dict, times: dict) -> None:
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(f"the loss is {values['loss']} at step {step}: a smaller learning rate may mend it")
    grid = {"grid_size": grid_size[0]} if grid_size else {}
    writer.write(step, "train", {**values, **grid, **{k: round(v, 4) for k, v in times.items()}})
    progress.update()
    duration = f"{1e3 * times['seconds']:.0f}ms"
    progress.set_postfix(loss=f"{values['loss']:.4f}", step=duration, grid=_points(grid_size), refresh=False)


def _check_finite(step: int, state) -> None:
    """Before a state is saved: from one that is not finite no run could go on."""
    params = jax.device_get(_on_one_device(state.params))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise FloatingPointError(f"parameters are not finite after step {step}: a smaller learning rate may mend it")


def _save(checkpoints: Checkpoints, step: int, state, config: dict, chosen: dict | None, *, scored: bool) -> None:
    checkpoints.save(step, state, config=config, chosen=chosen, score=chosen["score"] if scored else None)


def _validation_line(step: int, chosen: dict) -> str:
    if not chosen["grid_size"]:
        return f"step {step}, validation score {chosen['score']:.4f}"
    scores = "  ".join(f"{size}: {value:.4f}" for size, value in chosen["scores"].items())
    return f"step {step}, validation score by grid size  {scores}  (best {chosen['grid_size'][0]})"


@contextmanager
def _stop_requested() -> Iterator[Callable[[int], bool]]:
    """Inside, the first SIGINT or SIGTERM only sets what the function of the step returns; a second SIGINT interrupts.

    Several processes must stop at the same step: they ask one another, now and then.
    """
    requested = []

    def handle(number, frame):
        if requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        requested.append(number)
        tqdm.write("stopping after this step; once more to stop at once")

    def stopped(step: int) -> bool:
        if jax.process_count() == 1:
            return bool(requested)
        return step % ASK_EVERY == 0 and bool(np.any(process_allgather(np.array(bool(requested)))))

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread (a notebook's worker): signals stay as they are
        previous = {}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
