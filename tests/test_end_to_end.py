"""The two programs on small files: train, stop, resume, evaluate; and every mistake is one line."""

import csv
import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import matplotlib.image
import nibabel as nib
import numpy as np
import pytest

from configs import brain
from gridreg_jax.data.pipeline import Dataset
from gridreg_jax.data.preprocess import Lattice
from gridreg_jax.errors import InputError
from gridreg_jax.evaluation.evaluate import evaluate
from gridreg_jax.models import describe, keymorph
from gridreg_jax.training import loop
from gridreg_jax.training.checkpoint import Checkpoints
from gridreg_jax.training.loop import fit
from gridreg_jax.training.step import build_run
from gridreg_jax.training.trained import load_trained
from gridreg_jax.training.writers import read_metrics

ROOT = Path(__file__).parents[1]
STEPS = 60
# Small to compile: what the network's other parts do is shown where they are tested.
TINY = {
    "model.levels": 3,
    "model.skips": (1,),
    "model.width": 4,
    "model.window": 1,
    "model.iterations": 1,
    "model.contrast_window": 0,
    "data.shape": (16, 20, 16),
    "data.spacing": (1.0, 1.0, 1.0),
    "data.center": "image",
    "data.evaluation_pairs": (1, 2),
    "loss.similarity": "mse",
    "loss.dice": 0.5,
    "augmentation.affine": 0.02,
    "augmentation.noise": 0.01,
    "optimizer.name": "adam",
    "optimizer.learning_rate": 5e-3,
    "grid_sizes": (4, 5),
    "batch_size": 2,
    "steps": STEPS,
    "val_every": 30,
    "checkpoint_every": 16,
}


def tiny_config(subjects, **changes):
    """The config for brains, made tiny; `changes` with `__` for dots."""
    config = brain.get_config()
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(TINY | {"data.subjects": str(subjects)} | changes)
    return config


def start(program, *options):
    """Start `train.py` or `eval.py` as a user does, from the repository."""
    command = [sys.executable, program, *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def train_options(subjects, workdir):
    values = TINY | {"data.subjects": str(subjects)}
    return ["--config=configs/brain.py", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in values.items())]


def run(config, workdir):
    """What `train.py` does: the summary of the evaluation, or None for a run that was stopped."""
    return evaluate(workdir) if fit(config, workdir) else None


def final_params(workdir, steps=STEPS):
    with Checkpoints(workdir) as checkpoints:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        found = checkpoints.restore(lambda c: build_run(c).state_shapes(device), order=[steps], notify=pytest.fail)
    return found[1]


def losses(workdir):
    """The lines of a run without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "waiting")} for line in read_metrics(workdir)]


def cases(folder):
    with open(folder / "cases.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def assert_same_run(one, other):
    assert losses(one) == losses(other)
    for a, b in zip(jax.tree.leaves(final_params(one)), jax.tree.leaves(final_params(other)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert cases(one / "evaluation") == cases(other / "evaluation")


@pytest.fixture
def steps_that_count(monkeypatch):
    """Steps that change nothing and need no compiler."""

    def step(state, batch):
        return state.replace(step=state.step + 1), {"loss": np.float32(0.5)}

    monkeypatch.setattr(loop, "_compile", lambda *_: {(5,) * 3: step})


@pytest.fixture(scope="module")
def trained(subjects_csv, tmp_path_factory):
    """Folder and summary of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("trained")
    return workdir, run(tiny_config(subjects_csv), workdir)


def test_a_run_learns_and_leaves_its_results(trained):
    workdir, summary = trained
    lines = read_metrics(workdir)
    training = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    assert {line["grid_size"] for line in training} == {4, 5}
    assert all(0 <= line["waiting"] <= line["seconds"] for line in training)  # for data, and in all
    loss = [line["loss"] for line in training]
    assert np.mean(loss[-20:]) < 0.9 * np.mean(loss[:20])
    validation = [line for line in lines if line["kind"] == "val"]
    assert [line["step"] for line in validation] == [30, 60]
    for line in validation:
        assert line["scores"].keys() == {"4", "5"}
        assert line["score"] == max(line["scores"].values()) == line["scores"][str(line["grid_size"][0])]
        assert max(line["folding_percent"].values()) <= loop.FOLDING_PERCENT
    assert any((workdir / "events").iterdir())
    assert summary == json.loads((workdir / "evaluation" / "summary.json").read_text())


def test_a_grid_size_that_folds_is_chosen_only_if_all_do(monkeypatch):
    def summary(score, folding):
        return {"metrics": {"dice": {"after": score}, "folding_percent": {"after": folding}}}

    def chosen(found):
        monkeypatch.setattr(loop, "measure", lambda *_: [])
        monkeypatch.setattr(loop, "summarise", lambda rows, size: summary(*found[size[0]]))
        dataset = Dataset((), {"val": []}, (), Lattice((4, 4, 4), (1.0, 1.0, 1.0)), (), False)
        return loop.validate(print, {}, dataset, tuple(found))

    found = chosen({5: (0.7, 0.0), 10: (0.8, 0.01), 15: (0.9, 0.02)})
    assert (found["grid_size"], found["score"], found["scores"]["15"]) == ([10] * 3, 0.8, 0.9)
    assert chosen({5: (0.7, 0.5), 10: (0.9, 0.6)})["grid_size"] == [10] * 3


def test_the_results_of_the_evaluation(trained):
    workdir, summary = trained
    # The checkpoint with the best score, at the grid size that it was best with.
    best = max((line for line in read_metrics(workdir) if line["kind"] == "val"), key=lambda line: line["score"])
    assert (summary["grid_size"], summary["cases"]) == (best["grid_size"], 2)
    assert summary["metrics"].keys() >= {"dice", "tre_mm", "centroid_mm", "mse", "folding_percent", "sd_log_jacobian"}
    rows = cases(workdir / "evaluation")
    assert sorted((row["fixed"], row["moving"]) for row in rows) == [("image6", "image7"), ("image7", "image6")]
    for name in ("dice", "tre_mm", "mse"):
        for when in ("before", "after"):
            mean = np.mean([float(row[f"{name}_{when}"]) for row in rows])
            np.testing.assert_allclose(summary["metrics"][name][when], mean)
    assert {"dice_after_3", "dice_after_7"} < rows[0].keys()
    assert_pictures(workdir / "evaluation")


def assert_pictures(folder):
    assert sorted(path.name for path in folder.glob("*.png")) == ["case00.png", "case01.png", "loss.png"]
    for path in folder.glob("*.png"):
        assert matplotlib.image.imread(path)[..., :3].std() > 0.05


def test_a_run_stopped_by_ctrl_c_and_resumed_is_the_uninterrupted_one(trained, subjects_csv, tmp_path):
    process = start("train.py", *train_options(subjects_csv, tmp_path))
    while process.poll() is None and len(read_metrics(tmp_path)) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 0 and "Traceback" not in errors, errors
    stopped = read_metrics(tmp_path)[-1]["step"]
    assert 3 <= stopped < STEPS
    assert f"stopped at step {stopped} and saved" in output
    assert not (tmp_path / "evaluation").exists()
    assert run(tiny_config(subjects_csv), tmp_path) is not None
    assert_same_run(trained[0], tmp_path)


def test_a_run_whose_latest_checkpoint_is_damaged_goes_back_and_ends_the_same(trained, subjects_csv, tmp_path, capsys):
    workdir = tmp_path / "copy"
    shutil.copytree(trained[0], workdir)
    for path in (workdir / "checkpoints" / str(STEPS)).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:50])
    run(tiny_config(subjects_csv), workdir)
    assert f"{STEPS} is damaged and passed over" in capsys.readouterr().out
    assert_same_run(trained[0], workdir)


def test_a_finished_run_started_again_is_only_evaluated(trained, subjects_csv, tmp_path):
    before = (trained[0] / "metrics.jsonl").read_text()
    again = run(tiny_config(subjects_csv), trained[0])
    assert (trained[0] / "metrics.jsonl").read_text() == before
    assert again["metrics"]["dice"] == trained[1]["metrics"]["dice"]


def test_eval_on_a_list_of_pairs_at_another_grid_size(trained, subjects_csv, tmp_path):
    folder = subjects_csv.parent
    rows = [[f"{name}{i}.nii.gz" for name in ("image", "labels") for i in pair] for pair in [(0, 7), (6, 5)]]
    text = "\n".join(["fixed,moving,fixed_labels,moving_labels", *map(",".join, rows)]) + "\n"
    (folder / "other_pairs.csv").write_text(text)
    options = [f"--workdir={trained[0]}", f"--pairs={folder / 'other_pairs.csv'}", "--grid_size=6", f"--out={tmp_path}"]
    process = start("eval.py", *options)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "2 cases, control grid 6x6x6" in output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["grid_size"], summary["cases"]) == ([6, 6, 6], 2)
    for name in ("dice", "folding_percent", "sd_log_jacobian"):
        values = summary["metrics"][name]
        assert values.keys() == {"before", "after", "after_sd"} and np.isfinite([*values.values()]).all()
    assert [(row["fixed"], row["moving"]) for row in cases(tmp_path)] == [("image0", "image7"), ("image6", "image5")]
    assert_pictures(tmp_path)


def test_a_network_is_read_again_where_its_run_has_changed_and_only_there(trained, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(trained[0], workdir)
    first = load_trained(workdir, notify=print)
    assert load_trained(workdir, notify=print) is first
    with Checkpoints(workdir) as checkpoints:
        shutil.rmtree(workdir / "checkpoints" / str(checkpoints.best_step()))
    changed = load_trained(workdir, notify=print)
    assert not all(map(np.array_equal, jax.tree.leaves(first.params), jax.tree.leaves(changed.params)))


def test_a_run_of_another_version_is_named(trained, tmp_path, monkeypatch):
    other = dataclasses.replace(load_trained(trained[0], notify=print), params={"params": {}})
    monkeypatch.setattr("gridreg_jax.evaluation.evaluate.load_trained", lambda workdir, notify: other)
    with pytest.raises(InputError, match="parameters of another version, which do not fit the model"):
        evaluate(trained[0], out=tmp_path, notify=lambda line: None)


def test_eval_with_a_grid_size_for_each_case(trained, tmp_path):
    summary = evaluate(trained[0], grid_size="auto", out=tmp_path, notify=lambda line: None)
    assert summary["grid_size"] == "auto"
    assert {row["grid_size"] for row in cases(tmp_path)} <= {"4x4x4", "5x5x5"}


def test_instance_optimisation_raises_the_similarity_of_every_case(trained, tmp_path):
    plain, refined = (tmp_path / name for name in ("plain", "refined"))
    for folder, steps in ((plain, 0), (refined, 20)):
        summary = evaluate(trained[0], refine=steps, out=folder, notify=lambda line: None)
        assert summary["refinement_steps"] == steps
    for before, after in zip(cases(plain), cases(refined), strict=True):
        assert float(after["mse_after"]) < float(before["mse_after"])


def test_what_is_validated_is_what_is_evaluated(subjects_csv, tmp_path, monkeypatch, steps_that_count):
    """With segmenter and instance optimisation: without test subjects, the evaluation is of the validation pairs."""
    listed = subjects_csv.with_name("no_test_subjects.csv")
    listed.write_text(subjects_csv.read_text().replace(",test", ",val"))
    config = tiny_config(listed, grid_sizes=(5,), steps=2, val_every=2, refinement__steps=5, model__segmenter=4)
    taught = []
    monkeypatch.setattr(loop, "make_train_step", lambda model, *_, loss, **__: taught.append((model.labels, loss)))
    summary = run(config, tmp_path)
    ((labels, loss),) = taught
    assert labels == loss["num_labels"] == 2 and loss["segmentation"] > 0
    (validation,) = (line for line in read_metrics(tmp_path) if line["kind"] == "val")
    assert summary["refinement_steps"] == 5
    np.testing.assert_allclose(validation["score"], summary["metrics"]["dice"]["after"])


def test_a_bayesian_run_writes_its_uncertainty(subjects_csv, tmp_path):
    changes = dict(model__bayesian=True, grid_sizes=(5,), steps=6, val_every=6)
    summary = run(tiny_config(subjects_csv, **changes), tmp_path)
    assert {"image", "uncertainty", "loss"} < read_metrics(tmp_path)[0].keys()
    correlation = summary["metrics"]["sigma_error_spearman"]
    rows = cases(tmp_path / "evaluation")
    np.testing.assert_allclose(correlation["after"], np.mean([float(row["sigma_error_spearman"]) for row in rows]))
    evaluate(tmp_path, pictures=0, out=tmp_path / "again", notify=lambda line: None)
    assert sorted(path.name for path in (tmp_path / "again").glob("sigma*")) == ["sigma00.nii.gz", "sigma01.nii.gz"]
    image = nib.load(tmp_path / "evaluation" / "sigma00.nii.gz")
    sigma = image.get_fdata()
    assert sigma.shape == TINY["data.shape"] and sigma.min() > 0
    np.testing.assert_allclose(np.abs(np.diag(image.affine)[:3]), TINY["data.spacing"])
    assert_pictures(tmp_path / "evaluation")


def tiny_voxelmorph(subjects, **changes):
    config = brain.get_config("voxelmorph")
    common = {name: value for name, value in TINY.items() if not name.startswith("model.") and name != "grid_sizes"}
    tiny = dict(model__encoder=(4, 4), model__decoder=((4,), (4,), (4,)), model__steps=0)
    changes = tiny | dict(steps=6, val_every=3, checkpoint_every=2) | changes
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(common | {"data.subjects": str(subjects)} | changes)
    return config


@pytest.fixture(scope="module")
def dense(subjects_csv, tmp_path_factory):
    """Folder and summary of a run of a model that predicts no control grid."""
    workdir = tmp_path_factory.mktemp("dense")
    return workdir, run(tiny_voxelmorph(subjects_csv), workdir)


def test_a_model_without_a_control_grid_is_trained_and_evaluated_without_grid_size(dense):
    workdir, summary = dense
    training, validation = ([x for x in read_metrics(workdir) if x["kind"] == kind] for kind in ("train", "val"))
    assert all("grid_size" not in line and line["gradient"] >= 0 for line in training)
    assert [line["grid_size"] for line in validation] == [None, None]
    assert [line["scores"] for line in validation] == [{"none": line["score"]} for line in validation]
    assert (summary["grid_size"], summary["cases"]) == (None, 2)
    assert json.loads((workdir / "evaluation" / "summary.json").read_text()) == summary
    assert_pictures(workdir / "evaluation")


def test_a_model_without_a_control_grid_goes_on_where_it_stopped(dense, subjects_csv, tmp_path, monkeypatch):
    @contextmanager
    def after_four_steps():
        asked = iter([False] * 4)
        yield lambda step: next(asked, True)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_stop_requested", after_four_steps)
        assert not fit(tiny_voxelmorph(subjects_csv), tmp_path)
    assert read_metrics(tmp_path)[-1]["step"] == 4
    run(tiny_voxelmorph(subjects_csv), tmp_path)
    assert losses(dense[0]) == losses(tmp_path)
    assert cases(dense[0] / "evaluation") == cases(tmp_path / "evaluation")


def test_what_needs_a_control_grid_is_refused_without_one(dense, subjects_csv, tmp_path):
    for options in (dict(grid_size=(5, 5, 5)), dict(grid_size="auto"), dict(refine=10)):
        message = f"--{next(iter(options))}: the run's model, voxelmorph, predicts no control grid"
        with pytest.raises(InputError, match=message):
            evaluate(dense[0], **options)
    for name, value in dict(grid_sizes=(5,), refinement__steps=10).items():
        message = f"{name.replace('__', '.')} is .*, but the model 'voxelmorph' predicts no control grid"
        with pytest.raises(InputError, match=message):
            fit(tiny_voxelmorph(subjects_csv, **{name: value}), tmp_path / "run")


def tiny_keymorph(subjects, variant, **changes):
    config = brain.get_config(variant)
    common = {name: value for name, value in TINY.items() if not name.startswith("model.") and name != "grid_sizes"}
    changes = dict(model__keypoints=6, steps=1, val_every=100, checkpoint_every=100) | changes
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(common | {"data.subjects": str(subjects)} | changes)
    return config


def test_keypoints_are_pretrained_on_one_subject_and_the_next_run_begins_with_them(subjects_csv, tmp_path, monkeypatch):
    monkeypatch.setattr(keymorph, "WIDTHS", (8,))
    monkeypatch.setattr(keymorph, "HALVED", (0, 1))
    first, then = tmp_path / "first", tmp_path / "then"
    small = dict(augmentation__affine=0.02, augmentation__shift=0.5, augmentation__ramp=10)
    alone = dict(loss__dice=0.0, optimizer__learning_rate=2e-2, steps=40) | small
    assert fit(tiny_keymorph(subjects_csv, "keymorph_pretrain", **alone), first)
    errors = [line["keypoints"] for line in read_metrics(first) if line["kind"] == "train"]
    assert np.mean(errors[-10:]) < 0.7 * np.mean(errors[:5])
    still = dict(start=str(first))
    config = tiny_keymorph(subjects_csv, "keymorph", **still).to_dict()
    with Checkpoints(then) as checkpoints:
        step, state, _ = loop._initial_state(build_run(config), config, checkpoints, print)
    params = (jax.tree.leaves(one.params) for one in (state, final_params(first, steps=40)))
    assert step == 0
    for found, expected in zip(*params, strict=True):
        np.testing.assert_array_equal(found, expected)
    for changes, message in (
        (dict(model__keypoints=7), "the run in .*first has a model with other parameters"),
        (dict(start=str(tmp_path / "nowhere")), "nowhere: holds no run"),
        (dict(loss__keypoints=1.0, augmentation__elastic=1.0), "set augmentation.elastic to 0"),
    ):
        with pytest.raises(InputError, match=message):
            fit(tiny_keymorph(subjects_csv, "keymorph", **still | changes), tmp_path / "bad")


NO_OPTION = "the config has no such option: "
BAD_FLAGS = {
    "an unknown variant": ("train.py", ["--config=configs/brain.py:big"], "brain.py:big: there is no such variant"),
    "a misspelt option": ("train.py", ["--config.optimzer.learning_rate=1"], f"{NO_OPTION}optimzer. Did you mean"),
    "in a group": ("train.py", ["--config.optimizer.learning_rat=1"], f"{NO_OPTION}learning_rat. Did you mean"),
    "like no option": ("train.py", ["--config.zzz=1"], f"{NO_OPTION}zzz"),
    "a value of another kind": ("train.py", ["--config.steps=many"], "--config.steps=many: .*'many'$"),
    "a config that is not there": ("train.py", ["--config=configs/none.py"], "configs/none.py"),
    "no config": ("train.py", None, "config"),
    "an argument without a name": ("train.py", ["data.csv"], "'data.csv'.*--name=value"),
    "an unknown flag": ("train.py", ["--workdri=x"], "workdri"),
    "no workdir": ("eval.py", [], "workdir"),
    "a run and a system": ("eval.py", ["--workdir=none", "--system=ncf"], "give either --workdir .* or --system"),
    "a system without a config": ("eval.py", ["--system=ncf"], "--system and --config go together"),
    "an unknown system": ("eval.py", ["--system=syn", "--config=configs/brain.py"], "'syn' is not known; .* ncf, ants"),
    "a workdir without a run": ("eval.py", ["--workdir=none"], "none: holds no run"),
    "a grid size in words": ("eval.py", ["--workdir=none", "--grid_size=ten"], "--grid_size=ten: give one whole"),
    "too few numbers": ("train.py", ["--config.data.cohort_subjects=(3, 2)"], "data.cohort_subjects must be 3 whole"),
}


# Every program in a copy of one process that has imported, but not used, what takes long to import.
COPIES = """
import json, os, runpy, sys
import gridreg_jax.evaluation.evaluate, gridreg_jax.training.loop

for case, command in json.load(sys.stdin).items():
    if not os.fork():
        for descriptor, name in enumerate(("out", "err"), start=1):
            os.dup2(os.open(f"{sys.argv[1]}/{case}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv, status = command, 0
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # to clear up would copy what was imported
    print(case, os.waitstatus_to_exitcode(os.wait()[1]), sep="=")
"""


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """What the programs leave with each of the mistakes: exit status, output and errors."""
    folder, commands = tmp_path_factory.mktemp("mistakes"), {}
    for case, (program, options, _) in BAD_FLAGS.items():
        if program == "train.py" and options is not None:
            options = ["--config=configs/brain.py", f"--workdir={folder / 'run'}", *options]
        commands[case] = [program, *(options or [])]
    options = dict(input=json.dumps(commands), cwd=ROOT, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", COPIES, folder], check=True, **options)
    status = dict(line.split("=") for line in done.stdout.splitlines())
    return {
        case: (int(status[case]), *((folder / f"{case}.{name}").read_text() for name in ("out", "err")))
        for case in commands
    }


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_mistake_on_the_command_line_is_one_line(mistaken, case):
    status, output, errors = mistaken[case]
    assert status == 2, (output, errors)
    (line,) = errors.strip().splitlines()
    assert re.search(f"^error: .*{BAD_FLAGS[case][-1]}", line)
    assert "Traceback" not in line


def with_bad_image(tmp_path, subjects, write_nifti, array=None, labels=None):
    """The list of subjects, with one more that has this image or these labels."""
    good = np.random.default_rng(0).uniform(size=(16, 20, 16)).astype(np.float32)
    write_nifti(tmp_path / "the_image.nii.gz", good if array is None else array)
    write_nifti(tmp_path / "the_labels.nii.gz", np.zeros((16, 20, 16), np.int16) if labels is None else labels)
    rows = [f"{subjects.parent / f'image{i}.nii.gz'},{subjects.parent / f'labels{i}.nii.gz'}" for i in range(2)]
    rows = ["image,labels", *rows, "the_image.nii.gz,the_labels.nii.gz"]
    (tmp_path / "subjects.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "subjects.csv"


def nan_inside():
    array = np.random.default_rng(0).uniform(size=(16, 20, 16)).astype(np.float32)
    array[3, 4, 5] = np.nan
    return array


BAD_FILES = {
    "four dimensions": (dict(array=np.ones((16, 20, 16, 2), np.float32)), "the_image.nii.gz: one three-dimensional"),
    "NaN": (dict(array=nan_inside()), "the_image.nii.gz: 1 of 5120 voxels are not finite"),
    "constant": (dict(array=np.ones((16, 20, 16), np.float32)), "the_image.nii.gz: every voxel is 1"),
    "labels elsewhere": (dict(labels=np.ones((16, 20, 15), np.int16)), "the_labels.nii.gz: its shape .*the_image"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_before_training(case, tmp_path, subjects_csv, write_nifti):
    files, message = BAD_FILES[case]
    subjects = with_bad_image(tmp_path, subjects_csv, write_nifti, **files)
    with pytest.raises(InputError, match=message) as caught:
        fit(tiny_config(subjects), tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


BAD_VALUES = {
    "batch": (dict(batch_size=0), "batch_size 0 cannot be split"),
    "grid of a cubic spline": (dict(grid_sizes=(3, 5), model__interpolator="bspline"), "3x3x3 is too small: bspline"),
    "no grid": (dict(grid_sizes=()), "grid_sizes is empty"),
    "grid in words": (dict(grid_sizes=("ten",)), "grid_sizes must be whole numbers.*'ten'"),
    "interpolator": (dict(model__interpolator="linear"), "interpolator: 'linear' is not known"),
    "similarity": (dict(loss__similarity="mes"), "loss.similarity: 'mes' is not known"),
    "grid similarity": (dict(loss__grid_similarity="mes"), "loss.grid_similarity: 'mes' is not known"),
    "refinement": (dict(refinement__steps=-1), "refinement.steps must be 0 or more, not -1"),
    "seed": (dict(seed=-1), "seed must be 0 or more, not -1"),
    "rate": (dict(optimizer__learning_rate=-1.0), "optimizer.learning_rate must be 0 or more, not -1"),
    "noise": (dict(augmentation__noise=float("nan")), "augmentation.noise must be 0 or more, not nan"),
    "flip": (dict(augmentation__flip=2.0), "augmentation.flip is a probability, from 0 to 1, not 2.0"),
    "elastic": (dict(loss__elastic=("a", "b")), "loss.elastic must be two numbers, mu and lambda"),
    "keypoints": (dict(loss__keypoints=1.0), "loss.keypoints is on, but the model 'gridreg' predicts no keypoints"),
    "large grid": (dict(grid_sizes=(5, 400)), "grid size 400x400x400: the lattice has 16x20x16 voxels"),
    "samples": (dict(loss__samples=0), "loss.samples must be 1 or more, not 0"),
    "optimizer": (dict(optimizer__name="adm"), "optimizer.name: 'adm' is not known"),
    "model": (dict(model__name="gridreq"), "model: 'gridreq' is not known"),
    "field of the model": (dict(model__segmenter=-1), "model.segmenter is -1"),
    "heads": (dict(model__heads=3), "cannot be shared by 3 heads"),
    "steps": (dict(steps=0), "steps must be 1 or more"),
    "missing list": (dict(data__subjects="none.csv"), "none.csv: cannot be read"),
    "center": (dict(data__center="middle"), "lattice center: 'middle' is not known; known are mass, image"),
    "labels": (dict(data__labels=(4,)), "no image has label 4"),
    "evaluation pairs": (dict(data__evaluation_pairs=(0, 2)), "data.evaluation_pairs is .0, 2.: give 1 or more"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_bad_value_is_named_before_training(case, tmp_path, subjects_csv):
    changes, message = BAD_VALUES[case]
    with pytest.raises(InputError, match=message) as caught:
        fit(tiny_config(subjects_csv, **changes), tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["loss.dice", "model.segmenter"])
def test_what_needs_labels_is_refused_without_them(tmp_path, subjects_csv, field):
    rows = [f"{subjects_csv.parent / f'image{i}.nii.gz'}" for i in range(3)]
    (tmp_path / "subjects.csv").write_text("\n".join(["image", *rows]) + "\n")
    config = tiny_config(tmp_path / "subjects.csv", loss__dice=0.0)
    config.update_from_flattened_dict({field: 1})
    with pytest.raises(InputError, match=f"{field} is on, but not every image has labels"):
        fit(config, tmp_path / "run")


def test_a_workdir_of_another_model_is_refused_and_left_alone(trained, subjects_csv):
    before = {path: path.stat().st_mtime_ns for path in trained[0].rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"holds a run of another model \(width: 4 there, 8 now\)"):
        fit(tiny_config(subjects_csv, model__width=8), trained[0])
    assert {path: path.stat().st_mtime_ns for path in trained[0].rglob("*") if path.is_file()} == before


def test_a_run_from_before_a_field_of_the_model_was_there_goes_on(
    subjects_csv, tmp_path, monkeypatch, steps_that_count
):
    def of_before(model):
        return {name: value for name, value in describe(model).items() if name not in ("segmenter", "labels")}

    def goes_on(steps):
        return fit(tiny_config(subjects_csv, grid_sizes=(5,), steps=steps, val_every=9), tmp_path)

    monkeypatch.setattr(loop, "validate", lambda *_: dict(grid_size=[5] * 3, score=0.5, scores={}))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "describe", of_before)
        assert goes_on(1)
    assert goes_on(2)
    assert [line["step"] for line in read_metrics(tmp_path) if line["kind"] == "train"] == [1, 2]


def test_an_evaluation_of_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        evaluate(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="the run has no checkpoint yet"):
        evaluate(tmp_path)


def test_a_prediction_that_would_not_fit_is_refused_before_a_step(tmp_path, subjects_csv, monkeypatch):
    monkeypatch.setattr("gridreg_jax.memory.memory_available", lambda: 1000)
    with pytest.raises(InputError, match="a prediction at grid size 5 needs .* smaller data.shape or grid size"):
        fit(tiny_config(subjects_csv), tmp_path)
    assert not read_metrics(tmp_path)


def test_a_loss_that_is_not_finite_names_the_step(tmp_path, subjects_csv, monkeypatch):
    losses = iter([0.5, 0.4, float("nan"), 0.3])

    def step(state, batch):
        return state, {"loss": np.float32(next(losses))}

    monkeypatch.setattr(loop, "_compile", lambda *_: dict.fromkeys([(4,) * 3, (5,) * 3], step))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 3"):
        loop.fit(tiny_config(subjects_csv, checkpoint_every=3), tmp_path)
    assert [line["loss"] for line in read_metrics(tmp_path)] == pytest.approx([0.5, 0.4])
    with Checkpoints(tmp_path) as checkpoints:
        assert not checkpoints.steps()


def test_parameters_that_are_not_finite_are_not_saved(tmp_path, subjects_csv, monkeypatch):
    def step(state, batch):
        params = jax.tree.map(lambda leaf: leaf * (np.nan if state.step == 1 else 1.0), state.params)
        return state.replace(step=state.step + 1, params=params), {"loss": np.float32(0.5)}

    monkeypatch.setattr(loop, "_compile", lambda *_: dict.fromkeys([(4,) * 3, (5,) * 3], step))
    with pytest.raises(FloatingPointError, match="parameters are not finite after step 2"):
        loop.fit(tiny_config(subjects_csv, checkpoint_every=1), tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]


def test_the_seconds_of_a_step_are_without_those_of_a_save(tmp_path, subjects_csv, monkeypatch):
    def step(state, batch):
        return state, {"loss": np.float32(0.5)}

    chosen = {"grid_size": [4, 4, 4], "score": 0.5, "scores": {"4": 0.5}}
    monkeypatch.setattr(loop, "_compile", lambda *_: dict.fromkeys([(4, 4, 4), (5, 5, 5)], step))
    monkeypatch.setattr(loop, "validate", lambda *_: chosen)
    monkeypatch.setattr(loop, "_save", lambda *_, **__: time.sleep(1))
    assert fit(tiny_config(subjects_csv, steps=3, val_every=3, checkpoint_every=1), tmp_path)
    assert max(line["seconds"] for line in read_metrics(tmp_path) if line["kind"] == "train") < 1
