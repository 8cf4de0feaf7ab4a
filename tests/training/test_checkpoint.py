"""Checkpoints: what is kept, what comes back, and what happens when files are damaged."""

import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gridreg_jax.errors import InputError
from gridreg_jax.training.checkpoint import Checkpoints

# A reader that fails in a damaged folder may leave a task behind, collected at any time.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = {"model": {"name": "gridreg", "levels": 4, "skips": (3, 2)}, "seed": 3, "grid_sizes": (4, 5)}


def state(step):
    rng = np.random.default_rng(step)
    return {"step": jnp.asarray(step), "params": {"kernel": jnp.asarray(rng.normal(size=(40, 50)), jnp.float32)}}


def shapes(_):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state(0))


def save(workdir, scores):
    """One checkpoint a step from step 1 on, with these scores."""
    with Checkpoints(workdir) as checkpoints:
        for step, score in enumerate(scores, start=1):
            chosen = None if score is None else {"grid_size": [step] * 3, "score": score}
            checkpoints.save(step, state(step), config=CONFIG, chosen=chosen, score=score)


def restore(workdir, order=None):
    """Of a fresh process: what comes back, and the notices."""
    notices = []
    with Checkpoints(workdir) as checkpoints:
        order = checkpoints.steps()[::-1] if order is None else order
        return checkpoints.restore(shapes, order=order, notify=notices.append), notices


def assert_is_step(found, step):
    assert found[0] == step
    for leaf, expected in zip(jax.tree.leaves(found[1]), jax.tree.leaves(state(step)), strict=True):
        assert leaf.dtype == expected.dtype
        np.testing.assert_array_equal(leaf, expected)


def test_a_full_disk_is_one_line_and_leaves_what_is_there(tmp_path, monkeypatch):
    save(tmp_path, [0.5])
    with Checkpoints(tmp_path) as checkpoints:

        def full(*_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device\nSource locations: ...")

        monkeypatch.setattr(checkpoints._checkpointer, "save", full)
        with pytest.raises(InputError, match="the checkpoint of step 2 cannot be written .*No space left on device.$"):
            checkpoints.save(2, state(2), config=CONFIG, chosen=None, score=None)
    assert_is_step(restore(tmp_path)[0], 1)


def test_what_was_saved_comes_back(tmp_path):
    save(tmp_path, [0.5])
    found, notices = restore(tmp_path)
    assert_is_step(found, 1)
    assert found[2:] == (CONFIG, {"grid_size": [1, 1, 1], "score": 0.5})
    assert not notices
    json.dumps(found[2:])


def test_a_state_returns_to_the_sharding_it_is_asked_for(tmp_path):
    save(tmp_path, [None])
    found, _ = restore(tmp_path)
    assert found[1]["params"]["kernel"].sharding.device_set == {jax.devices()[0]}
    assert found[3] is None


@pytest.mark.parametrize(
    ("scores", "kept", "best"),
    [
        ([0.1, 0.9, 0.3, 0.4, 0.5], [2, 4, 5], 2),
        ([0.1, None, 0.3, None, None], [3, 4, 5], 3),
        ([None, None, None, None], [3, 4], 4),
        ([-3.0, -1.0, -2.0], [2, 3], 2),
    ],
)
def test_the_latest_two_and_the_best_are_kept(tmp_path, scores, kept, best):
    save(tmp_path, scores)
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best_step()) == (kept, best)


def test_ctrl_c_while_reading_is_not_taken_for_damage(tmp_path, monkeypatch):
    save(tmp_path, [0.5, 0.6])
    read = Checkpoints._read_info

    def interrupted(self, step):
        signal.raise_signal(signal.SIGINT)
        return read(self, step)

    monkeypatch.setattr(Checkpoints, "_read_info", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(KeyboardInterrupt):
            checkpoints.restore(shapes, order=[2, 1], notify=pytest.fail)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_checkpoint_yet(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best_step()) == ([], None)


def test_a_step_is_saved_once(tmp_path):
    save(tmp_path, [0.5])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(99), config=CONFIG, chosen=None, score=None)
    assert_is_step(restore(tmp_path)[0], 1)


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def truncate_all(folder):
    for path in files(folder):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncate_largest(folder):
    path = max(files(folder), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:100])


def delete_arrays(folder):
    for path in files(folder):
        if path.stat().st_size > 1000:
            path.unlink()


def delete_all_files(folder):
    for path in files(folder):
        path.unlink()


DAMAGES = [truncate_all, truncate_largest, delete_arrays, delete_all_files]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_notice(tmp_path, damage):
    save(tmp_path, [0.1, 0.2, 0.3])
    damage(tmp_path / "checkpoints" / "3")
    found, notices = restore(tmp_path, order=[3, 2])
    assert_is_step(found, 2)
    (notice,) = notices
    assert notice.startswith(f"checkpoint {tmp_path / 'checkpoints' / '3'} is damaged and passed over")
    assert len(notice.splitlines()) == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_parameters_come_back_without_their_shapes_being_known(tmp_path, damage):
    save(tmp_path, [0.5, 0.4])
    damage(tmp_path / "checkpoints" / "2")
    notices, device = [], jax.sharding.SingleDeviceSharding(jax.devices()[1])
    with Checkpoints(tmp_path) as checkpoints:
        step, params, config, chosen = checkpoints.restore_params(device, order=[2, 1], notify=notices.append)
    assert step == 1 and config == CONFIG and chosen["score"] == 0.5 and len(notices) == 1
    assert params.keys() == {"kernel"} and params["kernel"].devices() == {jax.devices()[1]}
    np.testing.assert_array_equal(params["kernel"], state(1)["params"]["kernel"])


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_steps_there_are_can_be_listed_and_restored_whatever_is_damaged(tmp_path, damage):
    save(tmp_path, [0.1, 0.2, 0.3])
    damage(tmp_path / "checkpoints" / "3")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() in (2, 3)
    assert_is_step(restore(tmp_path)[0], 2)


@pytest.mark.parametrize("damage", DAMAGES)
def test_saving_goes_on_before_at_and_after_the_step_of_a_damaged_checkpoint(tmp_path, damage):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, state(step), config=CONFIG, chosen=None, score=None)
    damage(tmp_path / "checkpoints" / "30")
    for step in (25, 30, 35):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.restore(shapes, order=checkpoints.steps()[::-1], notify=lambda _: None)
            checkpoints.save(step, state(step), config=CONFIG, chosen=None, score=None)
        assert_is_step(restore(tmp_path)[0], step)


def test_nothing_but_damage_is_an_error(tmp_path):
    save(tmp_path, [0.1, 0.2])
    for step in ("1", "2"):
        truncate_all(tmp_path / "checkpoints" / step)
    with pytest.raises(InputError, match="checkpoints: no checkpoint can be read"):
        restore(tmp_path, order=[2, 1])


def test_a_run_of_another_model_is_not_mistaken_for_damage(tmp_path):
    save(tmp_path, [0.1, 0.2])

    def refuse(config):
        raise InputError(f"a run of {config['model']['name']}")

    with Checkpoints(tmp_path) as checkpoints, pytest.raises(InputError, match="a run of gridreg"):
        checkpoints.restore(refuse, order=[2, 1], notify=pytest.fail)


def test_a_folder_that_was_moved_can_be_read(tmp_path):
    save(tmp_path / "here", [0.1, 0.2])
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert_is_step(restore(tmp_path / "there")[0], 2)
