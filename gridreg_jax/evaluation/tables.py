"""Tables of measurements: one row a case in CSV, means and spreads in a summary and on the terminal."""

import csv
from pathlib import Path

import numpy as np

from gridreg_jax.files import replacing

# What a summary shows, in this order; each has a value before and after registration.
SUMMARISED = ("dice", "tre_mm", "centroid_mm", "mse")
# Properties of the map alone: 0 for the identity, which is the map before.
OF_THE_MAP = ("folding_percent", "sd_log_jacobian")


def write_cases(path: Path, rows: list[dict]) -> None:
    """One row a case; columns in the order in which they first occur."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def summarise(rows: list[dict], grid_size: tuple[int, int, int]) -> dict:
    """`{"grid_size", "cases", "metrics": {name: {"before", "after", "after_sd"}}}`, means and standard deviations over
    the cases where a measurement is defined."""
    found = {}
    for name in SUMMARISED:
        after = _values(rows, f"{name}_after")
        if after.size:
            found[name] = {"before": float(_values(rows, f"{name}_before").mean()), **_spread(after)}
    for name in OF_THE_MAP:
        after = _values(rows, name)
        if after.size:
            found[name] = {"before": 0.0, **_spread(after)}
    found["seconds"] = {"after": float(np.median(_values(rows, "seconds")))}
    return {"grid_size": list(grid_size), "cases": len(rows), "metrics": found}


def format_summary(summary: dict) -> str:
    """A summary as a table for the terminal."""
    lines = [
        f"{summary['cases']} cases, control grid {'x'.join(map(str, summary['grid_size']))}",
        f"{'':18}{'before':>10}{'after':>10}{'sd':>10}",
    ]
    for name in (*SUMMARISED, *OF_THE_MAP):
        if name in summary["metrics"]:
            values = summary["metrics"][name]
            cells = "".join(f"{values[key]:10.4f}" for key in ("before", "after", "after_sd"))
            lines.append(f"{name:18}{cells}")
    lines.append(f"{'seconds a case':18}{'':10}{summary['metrics']['seconds']['after']:10.4f}")
    return "\n".join(lines)


def _values(rows: list[dict], name: str) -> np.ndarray:
    values = np.array([row.get(name, np.nan) for row in rows], dtype=float)
    return values[np.isfinite(values)]


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"after": float(values.mean()), "after_sd": float(values.std(ddof=1)) if values.size > 1 else 0.0}
