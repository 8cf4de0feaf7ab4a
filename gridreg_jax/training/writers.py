"""What a run writes while it trains: `metrics.jsonl` and TensorBoard events."""

import contextlib
import json
from pathlib import Path

from tensorboardX import SummaryWriter

from gridreg_jax.files import replacing


class MetricsWriter:
    """One JSON object a line, with its `step` and `kind` ("train" or "val"); the numbers also as TensorBoard events.

    Opened again at a step, it drops the lines after it: a resumed run leaves the file that an uninterrupted one would.
    """

    def __init__(self, workdir: Path, *, start: int):
        self._path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= start]
        with replacing(self._path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self._path, "a", buffering=1)
        self._events = SummaryWriter(str(workdir / "events"), purge_step=start + 1)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self._events.close()

    def write(self, step: int, kind: str, values: dict) -> None:
        self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, float):
                self._events.add_scalar(f"{kind}/{name}", value, step)


class SilentWriter(contextlib.nullcontext):
    """Of a process that is not the first: writes nothing."""

    def __enter__(self) -> "SilentWriter":
        return self

    def write(self, step: int, kind: str, values: dict) -> None:
        pass


def read_metrics(workdir: str | Path) -> list[dict]:
    """Lines of `metrics.jsonl`, none if there is no such file; an incomplete last line is left out."""
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
