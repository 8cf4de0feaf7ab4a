"""Tables of measurements: one row a case in CSV, means and spreads in a summary and on the terminal."""

import csv
from pathlib import Path

from gridreg_jax.files import replacing
from gridreg_jax.measure import OF_THE_MAP, OF_THE_UNCERTAINTY, SUMMARISED


def write_cases(path: Path, rows: list[dict]) -> None:
    """One row a case; columns in the order in which they first occur."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def format_summary(summary: dict) -> str:
    """A summary as a table for the terminal."""
    grid_size = summary["grid_size"]
    if grid_size:
        grid_size = ", control grid " + (
            "chosen for each case" if grid_size == "auto" else "x".join(map(str, grid_size))
        )
    steps = summary.get("refinement_steps")
    refined = f", {steps} steps of instance optimisation" if steps else ""
    system = f", {summary['system']} with {summary['threads']} threads" if "system" in summary else ""
    lines = [
        f"{summary['cases']} cases{grid_size or ''}{refined}{system}",
        f"{'':22}{'before':>10}{'after':>10}{'sd':>10}",
    ]
    for name in (*SUMMARISED, *OF_THE_MAP):
        if name in summary["metrics"]:
            values = summary["metrics"][name]
            cells = "".join(f"{values[key]:10.4f}" for key in ("before", "after", "after_sd"))
            lines.append(f"{name:22}{cells}")
    for name in OF_THE_UNCERTAINTY:
        if name in summary["metrics"]:
            values = summary["metrics"][name]
            lines.append(f"{name:22}{'':10}{values['after']:10.4f}{values['after_sd']:10.4f}")
    lines.append(f"{'seconds a case':22}{'':10}{summary['metrics']['seconds']['after']:10.4f}")
    return "\n".join(lines)


def format_rows(rows: list[dict]) -> str:
    """Rows with the same columns as a table for the terminal; the first column is a name."""
    name, *columns = rows[0]
    widths = [max(len(column), 10) + 2 for column in columns]
    first = max(len(str(row[name])) for row in rows)
    lines = [" " * first + "".join(column.rjust(width) for column, width in zip(columns, widths, strict=True))]
    for row in rows:
        cells = [f"{value:,}" if isinstance(value, int) else f"{value:.4f}" for value in list(row.values())[1:]]
        lines.append(str(row[name]).ljust(first) + "".join(c.rjust(w) for c, w in zip(cells, widths, strict=True)))
    return "\n".join(lines)
