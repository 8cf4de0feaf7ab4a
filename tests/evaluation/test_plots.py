"""Pictures are written whole, can be read, and show what they are given."""

import matplotlib.image
import numpy as np
import pytest

from gridreg_jax.evaluation import plots

SHAPE = (12, 14, 10)


def arrays(scale=1.0):
    rng = np.random.default_rng(0)
    images = {name: rng.uniform(size=(*SHAPE, 1)).astype(np.float32) for name in ("fixed", "moving", "warped")}
    return images | {"displacement": (scale * rng.normal(size=(*SHAPE, 3))).astype(np.float32)}


def lines(steps=60, validated=True):
    train = [dict(step=s, kind="train", loss=2 / s, image=1 / s, grid_size=5, seconds=0.1) for s in range(1, steps + 1)]
    val = [dict(step=s, kind="val", scores={"5": 0.5 + s / 200, "8": 0.6}) for s in (30, 60)]
    return train + val * validated


def read(path):
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 200 and picture.shape[1] > 400
    assert picture[..., :3].std() > 0.05  # not blank
    return picture


def test_picture_of_a_case(tmp_path):
    plots.case_picture(tmp_path / "new" / "case.png", arrays(), (1.0, 1.0, 1.0), "a and b")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["case.png"]
    picture = read(tmp_path / "new" / "case.png")
    plots.case_picture(tmp_path / "still.png", arrays(0.0), (1.0, 1.0, 1.0), "a and b")
    assert (picture != read(tmp_path / "still.png")).mean() > 0.01


def test_every_panel_shows_its_middle_plane_upright_and_in_proportion(tmp_path, monkeypatch):
    figures, factors = [], (1.1, 0.8, 1.5)
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    stretched = np.indices(SHAPE).transpose(1, 2, 3, 0) * np.subtract(factors, 1)
    given = arrays() | {"displacement": stretched, "sigma_mm": np.random.default_rng(1).uniform(size=SHAPE)}
    plots.case_picture(tmp_path / "case.png", given, (1.0, 2.0, 5.0), "")
    fixed, moving, warped = (given[name][..., 0] for name in ("fixed", "moving", "warped"))
    determinant = np.full(SHAPE, np.prod(factors))
    volumes = [fixed, moving, warped, moving - fixed, warped - fixed, fixed, determinant, given["sigma_mm"]]
    rows = np.reshape(figures[0].axes[: 3 * len(volumes)], (3, -1))  # colour bars come behind
    across = [(slice(None), slice(None), 5), (slice(None), 7), (6,)]
    for row, plane, aspect, shown in zip(rows, across, (2, 5, 2.5), [(0, 1), (0, 2), (1, 2)], strict=True):
        for axis, volume in zip(row, volumes, strict=True):
            (image,) = axis.images
            assert (image.origin, axis.get_aspect()) == ("lower", aspect)
            np.testing.assert_allclose(image.get_array(), volume[plane].T, atol=1e-5)
        right, upwards = (factors[along] * np.arange(SHAPE[along]) for along in shown)
        lines = row[5].lines
        assert len(lines) == len(right) + len(upwards)
        np.testing.assert_allclose(lines[2].get_xydata().T, [np.full_like(upwards, right[2]), upwards])
        np.testing.assert_allclose(lines[len(right) + 3].get_xydata().T, [right, np.full_like(right, upwards[3])])


def test_picture_keeps_the_proportions_of_the_voxels(tmp_path):
    plots.case_picture(tmp_path / "cubes.png", arrays(), (1.0, 1.0, 1.0), "")
    plots.case_picture(tmp_path / "slabs.png", arrays(), (1.0, 1.0, 4.0), "")
    cubes, slabs = read(tmp_path / "cubes.png"), read(tmp_path / "slabs.png")
    assert cubes.shape == slabs.shape and (cubes != slabs).mean() > 0.05


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("steps", [1, 60])
def test_picture_of_the_curves(tmp_path, steps, validated):
    plots.loss_curves(tmp_path / "loss.png", lines(steps, validated))
    read(tmp_path / "loss.png")


def test_curves_show_training_and_validation(tmp_path):
    pictures = []
    for number, chosen in enumerate((lines(), lines(validated=False), lines()[1:])):
        plots.loss_curves(tmp_path / f"{number}.png", chosen)
        pictures.append(read(tmp_path / f"{number}.png"))
    half = pictures[0].shape[1] // 2
    assert (pictures[0] != pictures[1])[:, half:].any() and (pictures[0] != pictures[2])[:, :half].any()


def test_curves_of_a_run_that_was_resumed_with_other_terms_and_grid_sizes(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    train = [dict(step=s, kind="train", loss=-2 / s, grid_size=5, seconds=0.1) for s in range(1, 5)]
    train = [line | ({"image": 1.0} if line["step"] < 3 else {"kl": 0.5}) for line in train]
    scores = {2: {"5": 0.5, "8": 0.6}, 4: {"8": 0.7, "10": 0.8}}
    val = [dict(step=step, kind="val", scores=found) for step, found in scores.items()]
    plots.loss_curves(tmp_path / "loss.png", train + val)
    plots.loss_curves(tmp_path / "loss.png", lines())
    (left, right), (positive, _) = (figure.axes for figure in figures)
    # Smoothed, each with a name, and as it was.
    drawn = {line.get_label(): line.get_ydata() for line in left.lines[::2]}
    nan = np.nan
    expected = {"loss": [-2, -1, -2 / 3, -0.5], "image": [1, 1, nan, nan], "kl": [nan, nan, 0.5, 0.5]}
    for name, values in expected.items():
        np.testing.assert_allclose(drawn[name], values)
    scores = {line.get_label(): line.get_ydata() for line in right.lines}
    np.testing.assert_allclose(scores["grid 5"], [0.5, nan])
    np.testing.assert_allclose(scores["grid 10"], [nan, 0.8])
    # A logarithmic axis would not show what is negative.
    assert (left.get_yscale(), positive.get_yscale()) == ("symlog", "log")
