"""Systems under one budget, and the table of them."""

import csv

import jax
import numpy as np
import pytest

from configs import compare as configs
from gridreg_jax.evaluation import compare as comparison
from gridreg_jax.evaluation.compare import compare
from gridreg_jax.training import loop
from gridreg_jax.training.checkpoint import Checkpoints

TINY = {
    "model.levels": 3,
    "model.skips": (1,),
    "model.width": 4,
    "model.window": 1,
    "model.iterations": 1,
    "model.segmenter": 2,
    "refinement.steps": 0,
    "data.shape": (16, 20, 16),
    "data.evaluation_pairs": (1, 2),
    "grid_sizes": (5,),
    **{f"augmentation.{name}": 0.0 for name in ("flip", "affine", "shift", "elastic", "contrast", "noise")},
    "steps": 2,
    "val_every": 2,
    "systems": ("gridreg", "voxelmorph_1"),
}


def test_systems_are_trained_and_evaluated_alike(subjects_csv, tmp_path, capsys, monkeypatch):
    def step(state, batch):
        return state.replace(step=state.step + 1), {"loss": np.float32(0.5)}

    def evaluate(folder, notify):
        dice = {"gridreg": 0.5, "voxelmorph_1": 0.25}[folder.name]
        grid_size = [5, 5, 5] if folder.name == "gridreg" else None
        return {"grid_size": grid_size, "metrics": {"dice": {"after": dice}, "seconds": {"after": 1.0}}}

    monkeypatch.setattr(loop, "_compile", lambda *_: {(5, 5, 5): step, None: step})
    monkeypatch.setattr(loop, "validate", lambda *_: dict(grid_size=None, score=0.5))
    monkeypatch.setattr(comparison, "evaluate", evaluate)
    config = configs.get_config()
    config.update_from_flattened_dict(TINY | {"data.subjects": str(subjects_csv)})
    config.lock()  # as on the command line
    rows = compare({system: configs.stages_of(config, system) for system in config.systems}, tmp_path)
    assert [row["system"] for row in rows] == list(TINY["systems"])
    assert rows[1]["parameters"] == 259_675
    # What a segmenter has depends on the number of labels.
    with Checkpoints(tmp_path / "gridreg") as checkpoints:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        _, params, *_ = checkpoints.restore_params(device, order=checkpoints.steps(), notify=pytest.fail)
    assert rows[0]["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert all(row["memory_mib"] > 0 for row in rows)
    table = capsys.readouterr().out
    assert all(f"{row['parameters']:,}" in table and f"{row['dice']:.4f}" in table for row in rows)
    with open(tmp_path / "comparison.csv", newline="") as file:
        expected = [("gridreg", "0.5"), ("voxelmorph_1", "0.25")]
        assert [(row["system"], row["dice"]) for row in csv.DictReader(file)] == expected


def test_keymorph_begins_with_what_its_pretraining_ended_with(monkeypatch, tmp_path):
    trained = []

    def fit(config, folder):
        trained.append((folder, config.start, config.loss.keypoints, config.steps))
        return True

    monkeypatch.setattr(comparison, "fit", fit)
    monkeypatch.setattr(comparison, "_cost", lambda *_: {})
    summary = {"grid_size": None, "metrics": {"dice": {"after": 0.5}, "seconds": {"after": 1.0}}}
    monkeypatch.setattr(comparison, "evaluate", lambda folder, notify: summary)
    config = configs.get_config("cpu")
    compare({system: configs.stages_of(config, system) for system in ("gridreg", "keymorph")}, tmp_path)
    before, after = tmp_path / "keymorph" / "before", tmp_path / "keymorph"
    assert trained == [
        (tmp_path / "gridreg", "", 0.0, 1000),
        (before, "", 1.0, 500),
        (after, str(before), 0.0, 500),
    ]


def test_a_system_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="'vxm' is not known; known are gridreg, voxelmorph"):
        configs.stages_of(configs.get_config(), "vxm")


def test_what_cannot_be_compared_is_refused_before_anything_is_trained():
    with pytest.raises(ValueError, match="compare.py:cpu,voxelmorph: --config.systems says which"):
        configs.get_config("cpu,voxelmorph")
    with pytest.raises(ValueError, match="compare.py:gpu: there is no such variant"):
        configs.get_config("gpu")
    config = configs.get_config()
    config.steps = 1
    with pytest.raises(ValueError, match="steps is 1: keymorph needs 2 or more"):
        configs.stages_of(config, "keymorph")
    config.loss.similarity = "ncc"
    with pytest.raises(ValueError, match="voxelmorph has weights of smoothness for mse and lncc alone, not for ncc"):
        configs.stages_of(config, "voxelmorph")


def test_every_system_has_the_optimiser_that_the_rates_are_for():
    config = configs.get_config()
    stages = [stage for system in config.systems for stage in configs.stages_of(config, system)]
    optimizers = [stage.optimizer.to_dict() | {"learning_rate": None} for stage in stages]
    assert all(optimizer == optimizers[0] for optimizer in optimizers)
    assert optimizers[0]["name"] == "adam"
