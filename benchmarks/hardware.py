"""What a benchmark ran on."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from gridreg_jax.cores import cores


def hardware(device: str | None = None, *, packages: Sequence[str] = ("jax",)) -> dict:
    """As the JSON of every benchmark states it.

    Args:
      device: its kind; None: asks JAX, which on an accelerator takes most of the memory for this process.
      packages: whose versions are stated.
    """
    if device is None:
        import jax  # not above: it would count as memory of PyTorch's process

        device = jax.devices()[0].device_kind
    versions = {name: version(name) for name in packages}
    return {"device": device, "cpu": cpu_model(), "cores": cores(), "versions": versions}


def cpu_model() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
