"""Several processes: together they are one run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import brain
from gridreg_jax.doorway import join_processes
from gridreg_jax.errors import InputError
from gridreg_jax.evaluation.evaluate import evaluate
from gridreg_jax.training.checkpoint import Checkpoints
from gridreg_jax.training.loop import fit
from gridreg_jax.training.step import build_run
from gridreg_jax.training.writers import read_metrics

STEPS = 5
TINY = {
    # The least to compile.
    "model.levels": 1,
    "model.skips": (),
    "model.width": 4,
    "model.window": 1,
    "model.iterations": 1,
    "model.contrast_window": 0,
    "model.interpolator": "trilinear",
    "loss.similarity": "mse",
    "data.shape": (16, 20, 16),
    "data.spacing": (1.0, 1.0, 1.0),
    "data.center": "image",
    "data.evaluation_pairs": (1, 2),
    # Plain gradient descent: Adam would hide a gradient that is off by a factor, and magnify rounding.
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.05,
    "augmentation.noise": 0.01,
    "grid_sizes": (5,),
    "batch_size": 2,
    "steps": STEPS,
    "val_every": STEPS,
}


def params(workdir):
    with Checkpoints(workdir) as checkpoints:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        found = checkpoints.restore(lambda c: build_run(c).state_shapes(device), order=[STEPS], notify=pytest.fail)
    return found[1].params


@pytest.fixture
def port():
    """A port that no program has."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.mark.skipif(jax.local_device_count() != 2, reason="the run that they must equal has two devices")
def test_two_processes_are_two_devices(subjects_csv, tmp_path, port):
    values = TINY | {"data.subjects": str(subjects_csv)}
    command = [sys.executable, "train.py", "--config=configs/brain.py", f"--workdir={tmp_path / 'two'}"]
    command += [f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    command += [f"--config.{name}={value}" for name, value in values.items()]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # one device each
    options = dict(cwd=Path(__file__).parents[2], env=environment, stderr=subprocess.PIPE, text=True)
    programs = [subprocess.Popen([*command, f"--process={index}"], **options) for index in (0, 1)]
    config = brain.get_config()
    config.update_from_flattened_dict(values)
    fit(config, tmp_path / "one")
    for program in programs:
        _, errors = program.communicate(timeout=300)
        assert program.returncode == 0, errors
    two, one = (read_metrics(tmp_path / name) for name in ("two", "one"))
    assert [(line["kind"], line["step"]) for line in two] == [(line["kind"], line["step"]) for line in one]
    for line, expected in zip(two[:STEPS], one, strict=False):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for a, b in zip(*(jax.tree.leaves(params(tmp_path / name)) for name in ("two", "one")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert evaluate(tmp_path / "two", pictures=0, notify=lambda line: None)["cases"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("host:1", 2, None), "--coordinator=host:port needs --processes"),
        ((None, 2, 0), "need --coordinator=host:port"),
        (("auto", 2, 0), "leave them out"),
        (("auto", None, None), "did not find each other"),
    ],
)
def test_processes_that_cannot_be_joined(options, message):
    with pytest.raises(InputError, match=message):
        join_processes(*options)


def test_a_port_that_another_program_has_is_named():
    with socket.create_server(("", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(InputError, match=f"--coordinator={address}: that port cannot be used here .*in use"):
            join_processes(address, 2, 0)


def test_systems_are_compared_by_one_process():
    command = [sys.executable, "train.py", "--config=configs/compare.py", "--coordinator=host:1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    message = "error: several systems are compared by one process: leave out --coordinator\n"
    assert (done.returncode, done.stderr) == (2, message)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6, which JAX listens on")
def test_a_port_that_another_coordinator_would_share_is_named(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *options: pytest.fail("joined"))
    options = dict(family=socket.AF_INET6, dualstack_ipv6=True, reuse_port=hasattr(socket, "SO_REUSEPORT"))
    with socket.create_server(("", 0), **options) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(InputError, match="that port cannot be used here .*in use"):
            join_processes(address, 2, 0)


def test_a_port_whose_last_connection_has_just_ended_is_used(monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *options: joined.append(options))
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = other.getsockname()
        client = socket.create_connection(address)
        other.accept()[0].close()  # the side that closes first keeps the port for a while
        client.close()
    join_processes(f"127.0.0.1:{address[1]}", 2, 0)
    assert joined == [(f"127.0.0.1:{address[1]}", 2, 0)]
