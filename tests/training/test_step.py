"""The training step: several devices do what one does, and the state is consumed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gridreg_jax import memory
from gridreg_jax.errors import InputError
from gridreg_jax.losses import SIMILARITIES
from gridreg_jax.programs import compiler_options, stored
from gridreg_jax.training import step as training

SHAPE, BATCH, STEPS, GRID = (16, 20, 16), 2, 5, (4, 5, 4)
CONFIG = dict(
    seed=0,
    steps=STEPS,
    grid_sizes=(4,),
    batch_size=BATCH,
    model=dict(name="gridreg", levels=3, skips=(1,), width=4, projection=8, decoder=8, heads=2, window=1),
    # Plain gradient descent: Adam would hide a gradient that is off by a factor.
    optimizer=dict(name="sgd", learning_rate=0.05),
    data=dict(shape=SHAPE),
)
# Where any network will do.
SMALL = dict(name="voxelmorph", encoder=(4,), decoder=((4,), (4,)))
LOSS = dict(interpolator="trilinear", num_labels=2, dice=1.0)
AUGMENTATION = dict(flip=0.5, contrast=0.1, noise=0.02)


def batch(examples=range(BATCH)):
    """Two blobs that lie elsewhere in each image: the gradients of the examples differ."""
    images = []
    for seed in examples:
        rng = np.random.default_rng(seed)
        grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
        squared = [((grid - center) ** 2).sum(-1) for center in rng.uniform([4, 5, 4], [11, 14, 11], (4, 3))]
        pair = squared[:2], squared[2:]
        images.append([(sum(np.exp(-d / 12) for d in two), np.select([d < 12 for d in two], [1, 2])) for two in pair])
    arrays = {}
    for side, name in enumerate(("fixed", "moving")):
        arrays[name] = np.stack([pair[side][0] for pair in images])[..., None].astype(np.float32)
        arrays[f"{name}_labels"] = np.stack([pair[side][1] for pair in images]).astype(np.int32)
    return arrays


@functools.cache
def run_and_step():
    run = training.build_run(CONFIG)
    return run, training.make_train_step(run.model, run.optimizer, seed=0, loss=LOSS, augmentation=AUGMENTATION)


@functools.cache
def initial(run):
    return jax.device_get(run.init_state())


def train(examples=range(BATCH)):
    """Parameters and loss after some steps on one batch, and the state they started from."""
    run, step = run_and_step()
    start = state = jax.device_put(initial(run), run.replicated)
    for _ in range(STEPS):
        state, metrics = step(state, training.shard(batch(examples)), GRID)
        losses = jax.device_get(metrics)
    return by_path(state.params), losses, state, start


def step_with_noise():
    """What a step changes, and the loss, of a model that draws a velocity of its own for every example."""
    run = training.build_run(CONFIG | dict(model=SMALL | dict(steps=1, probabilistic=True), grid_sizes=()))
    loss = LOSS | dict(bending=0.0, kl=1e-3)
    step = training.make_train_step(run.model, run.optimizer, seed=0, loss=loss, augmentation={})
    rng, shapes = np.random.default_rng(0), run.state_shapes(run.replicated).params
    params = jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
    # A voxel of noise, to be seen.
    params["params"]["log_variance"] = jax.tree.map(np.zeros_like, params["params"]["log_variance"])
    given = jax.device_put((params, np.int32(0)), run.replicated)
    gradient, metrics = step.gradient(*given, training.shard(batch()), None)
    rate = CONFIG["optimizer"]["learning_rate"]
    return {name: rate * leaf for name, leaf in by_path(gradient).items()} | jax.device_get(metrics)


def by_path(params):
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


@pytest.fixture(scope="module")
def on_all_devices():
    if jax.local_device_count() != 2 or jax.default_backend() != "cpu":
        pytest.skip("needs two CPU devices: XLA_FLAGS=--xla_force_host_platform_device_count=2")
    return train()


@pytest.fixture
def one_device(monkeypatch):
    """All that follows is trained on one device."""
    monkeypatch.setattr(training, "sharing", lambda batch_size: jax.devices()[:1])


def test_two_devices_take_the_steps_of_one(on_all_devices, one_device):
    params, losses, state, _ = on_all_devices
    expected, expected_losses, of_one, _ = train()
    used = [len(jax.tree.leaves(each.params)[0].sharding.device_set) for each in (state, of_one)]
    assert used == [2, 1]
    np.testing.assert_allclose(losses["loss"], expected_losses["loss"], atol=1e-5)
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, expected[name], atol=1e-5, err_msg=name)


def test_the_noise_of_an_example_does_not_depend_on_the_number_of_devices(on_all_devices, request):
    on_all = step_with_noise()
    request.getfixturevalue("one_device")
    on_one = step_with_noise()
    for name, value in on_all.items():
        np.testing.assert_allclose(value, on_one[name], atol=1e-5, err_msg=name)


def test_every_example_counts_so_that_a_forgotten_mean_over_devices_would_show(on_all_devices):
    """Were gradients not averaged, the state would follow the first device's examples alone."""
    both, losses, *_ = on_all_devices
    first, first_losses, *_ = train(examples=[0, 0])
    assert max(np.abs(both[name] - first[name]).max() for name in both) > 1e-3
    assert abs(losses["loss"] - first_losses["loss"]) > 1e-3


def test_the_state_counts_steps_and_the_old_one_is_given_up(on_all_devices):
    _, losses, state, start = on_all_devices
    assert int(state.step) == STEPS
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start.params))
    assert losses.keys() == {"loss", "image", "grid", "dice", "bending"}
    np.testing.assert_allclose(losses["loss"], sum(losses[name] for name in losses if name != "loss"), rtol=1e-5)


def test_a_state_is_the_same_on_every_device(on_all_devices):
    _, _, state, _ = on_all_devices
    for leaf in jax.tree.leaves(state):
        first, second = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        np.testing.assert_array_equal(first, second)


def test_shard_keeps_the_order_of_the_examples():
    devices = jax.local_device_count()
    array = np.arange(2 * devices * 3).reshape(2 * devices, 3)
    sharded = training.shard({"fixed": array})["fixed"]
    assert sharded.shape == (devices, 2, 3)
    np.testing.assert_array_equal(sharded.reshape(array.shape), array)


@pytest.mark.parametrize(("batch_size", "used"), [(1, 1), (3, 1), (4, 2), (6, 2)])
def test_as_many_devices_share_a_batch_as_can_have_equal_parts(batch_size, used):
    if jax.local_device_count() != 2:
        pytest.skip("needs two devices")
    assert training.sharing(batch_size) == jax.devices()[:used]
    array = np.arange(batch_size * 3).reshape(batch_size, 3)
    sharded = training.shard({"fixed": array})["fixed"]
    assert sharded.shape == (used, batch_size // used, 3) and sharded.sharding.device_set == {*jax.devices()[:used]}


def test_a_batch_of_one_is_trained_on_one_of_several_devices():
    run = training.build_run(CONFIG | dict(batch_size=1, model=SMALL | dict(steps=0), grid_sizes=()))
    step = training.make_train_step(run.model, run.optimizer, seed=0, loss=LOSS, augmentation=dict(noise=0.02))
    state, one = run.init_state(), training.shard(batch([0]))
    compiled, _ = training.compile_steps(step, state, one, [None])
    for _ in range(2):
        state, metrics = compiled[None](state, one)
    assert int(state.step) == 2 and np.isfinite(metrics["loss"])
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {1}


@pytest.mark.parametrize("batch_size", [0, 1, 3])
def test_a_batch_that_processes_cannot_share_is_refused_with_the_next_that_they_can(monkeypatch, batch_size):
    if jax.local_device_count() != 2:
        pytest.skip("needs two devices")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert len(training.sharing(4)) == 2
    message = f"batch_size {batch_size} cannot be split over 2 devices; {4 if batch_size == 3 else 2} would fit"
    with pytest.raises(InputError, match=message):
        training.sharing(batch_size)


def test_compiled_steps_are_the_step_and_know_their_memory(on_all_devices):
    run, step = run_and_step()
    state, sharded = jax.device_put(initial(run), run.replicated), training.shard(batch())
    compiled, needed = training.compile_steps(step, state, sharded, [GRID])
    assert list(compiled) == [GRID]
    # At least the state and the batch must fit.
    assert needed > sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    for _ in range(STEPS):
        state, _ = compiled[GRID](state, sharded)
    params = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    for name, leaf in on_all_devices[0].items():
        np.testing.assert_allclose(params[name], leaf, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "encoder, similarity, traced",
    [("strided", "mse", 1), ("gridreg_jax.models.layers:Encoder", "mse", 2), ("strided", "mine", 2)],
)
def test_a_later_start_traces_the_network_only_if_it_has_code_from_elsewhere(
    encoder, similarity, traced, program_cache, monkeypatch
):
    monkeypatch.setitem(SIMILARITIES, "mine", lambda fixed, warped: jnp.abs(fixed - warped).mean((1, 2, 3, 4)))
    calls, whole = [], training.objective
    monkeypatch.setattr(training, "objective", lambda *a, **k: calls.append(a) or whole(*a, **k))
    fields = dict(levels=1, skips=(), encoder=encoder, iterations=2)
    run = training.build_run(CONFIG | dict(model=CONFIG["model"] | fields))
    state, sharded = run.init_state(), training.shard(batch())
    texts = []
    for _ in range(2):
        # As in another process.
        jax.clear_caches()
        fresh = stored(training._loss_gradient.__wrapped__, static_argnames=("model", "grid_size", "loss", "remat"))
        monkeypatch.setattr(training, "_loss_gradient", fresh)
        loss = LOSS | dict(similarity=similarity)
        step = training.make_train_step(run.model, run.optimizer, seed=0, loss=loss, augmentation={})
        texts.append(step.gradient.lower(state.params, state.step, sharded, GRID).as_text())
    assert len(calls) == traced
    assert texts[0] == texts[1]


def test_all_but_convolutions_is_computed_again_for_the_gradient_and_changes_nothing():
    run = training.build_run(CONFIG)
    state, sharded = run.init_state(), training.shard(batch())
    gradients, norms, convolutions = [], [], []
    for remat in (False, True):
        step = training.make_train_step(run.model, run.optimizer, seed=0, loss=LOSS, augmentation={}, remat=remat)
        lowered = step.gradient.lower(state.params, state.step, sharded, GRID)
        gradients.append(by_path(lowered.compile()(state.params, state.step, sharded)[0]))
        text = lowered.as_text()
        norms.append(text.count("stablehlo.rsqrt"))
        convolutions.append(text.count("stablehlo.convolution"))
    for path, kept in gradients[0].items():
        np.testing.assert_allclose(gradients[1][path], kept, atol=1e-6, err_msg=path)
    assert norms[1] > norms[0] and convolutions[1] == convolutions[0] > 0


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the schedule of the CPU")
def test_steps_are_scheduled_for_memory():
    def independent_parts(x):
        return sum((jnp.sin(i * x[:, None]) @ jnp.cos(i * x[None])).max(1) for i in range(6))

    lowered = jax.jit(independent_parts).lower(jnp.ones(500))
    temporaries = [
        lowered.compile(options).memory_analysis().temp_size_in_bytes for options in (compiler_options(), {})
    ]
    assert temporaries[0] < 0.8 * temporaries[1]


def test_a_step_that_would_not_fit_is_refused_before_it_runs(monkeypatch):
    run, step = run_and_step()
    monkeypatch.setattr(memory, "memory_available", lambda: 0)
    with pytest.raises(InputError, match="a step at grid size 4 needs .* and 0.0 GiB are free: a smaller"):
        training.compile_steps(step, jax.device_put(initial(run), run.replicated), training.shard(batch()), [GRID])
