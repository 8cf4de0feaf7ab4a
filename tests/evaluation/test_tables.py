"""Tables: one row a case, and means and standard deviations over the cases where there is a value."""

import csv

import numpy as np
import pytest

from gridreg_jax.evaluation import tables
from gridreg_jax.measure import summarise

NAN = float("nan")
ROWS = [
    dict(fixed="a", moving="b", dice_before=0.4, dice_after=0.8, tre_mm_before=5.0, tre_mm_after=2.0),
    dict(fixed="a", moving="c", dice_before=0.5, dice_after=0.7, tre_mm_before=NAN, tre_mm_after=NAN),
    dict(fixed="b", moving="c", dice_before=0.3, dice_after=0.9, tre_mm_before=7.0, tre_mm_after=3.0),
]
MAP = [dict(folding_percent=p, sd_log_jacobian=s, seconds=t) for p, s, t in [(0, 0.1, 9), (1, 0.3, 1), (5, 0.2, 2)]]


@pytest.fixture
def rows():
    return [row | of_map for row, of_map in zip(ROWS, MAP, strict=True)]


def test_summary_agrees_with_numpy(rows):
    summary = summarise(rows, (8, 10, 8))
    assert (summary["grid_size"], summary["cases"]) == ([8, 10, 8], 3)
    assert summary["metrics"].keys() == {"dice", "tre_mm", "folding_percent", "sd_log_jacobian", "seconds"}
    dice = summary["metrics"]["dice"]
    np.testing.assert_allclose(dice["before"], np.mean([0.4, 0.5, 0.3]))
    np.testing.assert_allclose([dice["after"], dice["after_sd"]], [0.8, np.std([0.8, 0.7, 0.9], ddof=1)])
    folding = summary["metrics"]["folding_percent"]
    np.testing.assert_allclose([*folding.values()], [0, 2, np.std([0, 1, 5], ddof=1)])
    assert [*folding] == ["before", "after", "after_sd"]
    assert summary["metrics"]["seconds"] == {"after": 2}  # the median: a slow first case does not count


def test_a_case_without_a_value_does_not_count(rows):
    tre = summarise(rows, (5, 5, 5))["metrics"]["tre_mm"]
    np.testing.assert_allclose([*tre.values()], [6, 2.5, np.std([2, 3], ddof=1)])


def test_what_no_case_has_is_left_out(rows):
    for row in rows:
        row["tre_mm_after"] = NAN
    assert "tre_mm" not in summarise(rows, (5, 5, 5))["metrics"]


def test_one_case_has_no_spread(rows):
    dice = summarise(rows[:1], (5, 5, 5))["metrics"]["dice"]
    assert dice == {"before": 0.4, "after": 0.8, "after_sd": 0}


def test_cases_come_back_from_csv(rows, tmp_path):
    rows[1]["dice_after_7"] = 0.25  # a column that only some cases have
    tables.write_cases(tmp_path / "new" / "cases.csv", rows)
    with open(tmp_path / "new" / "cases.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [*read[0]] == [*rows[0], "dice_after_7"]
    for one, row in zip(read, rows, strict=True):
        assert (one["fixed"], one["moving"]) == (row["fixed"], row["moving"])
        assert float(one["dice_after"]) == row["dice_after"]
    assert [one["dice_after_7"] for one in read] == ["", "0.25", ""]


def test_the_terminal_shows_what_the_summary_holds(rows):
    for grid_size, shown in (((8, 10, 8), ", control grid 8x10x8"), ("auto", ", control grid chosen for each case")):
        assert tables.format_summary(summarise(rows, grid_size)).splitlines()[0] == f"3 cases{shown}"
    lines = tables.format_summary(summarise(rows, None)).splitlines()
    assert lines[0] == "3 cases"
    shown = {line[:22].strip(): line[22:].split() for line in lines[2:]}
    assert shown["dice"] == ["0.4000", "0.8000", "0.1000"]
    assert shown.keys() == {"dice", "tre_mm", "folding_percent", "sd_log_jacobian", "seconds a case"}


def test_columns_of_any_width_stand_below_their_names():
    rows = [
        dict(system="a", dice=0.5, mse=1.0, number_of_parameters=1_234_567),
        dict(system="the longest", dice=0.25, mse=0.125, number_of_parameters=8),
    ]
    assert tables.format_rows(rows).splitlines() == [
        "                   dice         mse  number_of_parameters",
        "a                0.5000      1.0000             1,234,567",
        "the longest      0.2500      0.1250                     8",
    ]
