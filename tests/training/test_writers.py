"""Lines of `metrics.jsonl` and TensorBoard events of a run, also one that was resumed."""

import json

import pytest

from gridreg_jax.training.writers import MetricsWriter, read_metrics


def write(folder, steps, start=0):
    with MetricsWriter(folder, start=start) as writer:
        for step in steps:
            writer.write(step, "train", {"loss": 1 / step, "grid_size": 5})


def steps(folder):
    return [line["step"] for line in read_metrics(folder)]


def test_lines_hold_what_was_written(tmp_path):
    with MetricsWriter(tmp_path, start=0) as writer:
        writer.write(1, "train", {"loss": 0.1 + 0.2, "grid_size": 5})
        writer.write(1, "val", {"grid_size": [5, 5, 5], "scores": {"5": 0.7}})
        # Each line is on disk at once: another process may follow the file.
        assert len(read_metrics(tmp_path)) == 2
    assert read_metrics(tmp_path) == [
        {"step": 1, "kind": "train", "loss": 0.1 + 0.2, "grid_size": 5},
        {"step": 1, "kind": "val", "grid_size": [5, 5, 5], "scores": {"5": 0.7}},
    ]


def test_resuming_drops_the_lines_after_its_step(tmp_path):
    write(tmp_path, [1, 2, 3, 4, 5])
    write(tmp_path, [4, 5, 6], start=3)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    write(tmp_path, [1], start=0)
    assert steps(tmp_path) == [1]


def test_a_line_cut_short_is_dropped(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "ki')
    assert steps(tmp_path) == [1, 2]
    write(tmp_path, [3], start=2)
    assert steps(tmp_path) == [1, 2, 3]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_no_file_is_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []


def test_numbers_become_events(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, [1, 2, 4])
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1), (2, 0.5), (4, 0.25)]
