"""Named random streams: functions of seed, name and step, and of nothing else."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from gridreg_jax import rng

DRAW = """
import jax
from gridreg_jax import rng
print(int(jax.random.bits(rng.key(7, "pairs", 3))), rng.generator(7, "pairs", 3).integers(2**62))
"""


def draw_key(seed, stream, step=0):
    return int(jax.random.bits(rng.key(seed, stream, step)))


def draw_generator(seed, stream, step=0):
    return int(rng.generator(seed, stream, step).integers(2**62))


draws = pytest.mark.parametrize("draw", [draw_key, draw_generator])


@draws
def test_seed_stream_and_step_each_make_a_difference(draw):
    values = {draw(seed, stream, step) for seed in (0, 1) for stream in ("model", "pairs") for step in (0, 1, 2)}
    assert len(values) == 12


@draws
def test_the_same_again_and_step_0_unless_given(draw):
    assert draw(5, "model", 2) == draw(5, "model", 2)
    assert draw(5, "model") == draw(5, "model", 0)


def test_the_step_of_a_key_may_be_traced():
    traced = jax.jit(lambda step: jax.random.bits(rng.key(5, "model", step)))
    assert int(traced(3)) == draw_key(5, "model", 3)


def test_neighbouring_steps_are_not_alike():
    draws = np.array([rng.generator(0, "pairs", step).standard_normal(200) for step in range(20)])
    correlation = np.corrcoef(draws)[~np.eye(20, dtype=bool)]
    assert np.abs(correlation).max() < 0.4


def test_another_process_draws_the_same():
    # Python's own hash of a string would differ: its salt is set apart here.
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    printed = subprocess.run([sys.executable, "-c", DRAW], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.split() == [str(draw_key(7, "pairs", 3)), str(draw_generator(7, "pairs", 3))]
