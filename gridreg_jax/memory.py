"""Memory: what programs need and what is left for them, and what the C library's allocator keeps (glibc alone)."""

import contextlib
import ctypes
import gc
import math
from pathlib import Path

import psutil

from gridreg_jax.errors import InputError

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
# Bytes from which a block is mapped for itself, and so goes back to the system when it is freed: the temporaries of a
# training step, which else may leave a hole where the next ones do not fit. What a prediction takes is kept for the
# next one: to map it anew takes a fifth of its time.
_LARGE = 64 * 2**20


def limit_freed_memory() -> None:
    """Keep some of what is freed, not all: the largest blocks go back to the system, and all threads share one pool.

    With a pool for each thread, a training holds up to a fifth more.
    """
    libc = _glibc()
    if libc:
        libc.mallopt(_M_ARENA_MAX, 1)
        # glibc before 2.35 refuses so much, and with the other one alone would not find good ones by itself any more.
        if libc.mallopt(_M_MMAP_THRESHOLD, _LARGE):
            libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE)


def return_freed_memory() -> None:
    """Give what is freed back to the system."""
    gc.collect()
    libc = _glibc()
    if libc:
        libc.malloc_trim(0)


def check_memory(needed: int, what: str, grid_size: tuple[int, int, int] | None, *smaller: str, held: int) -> None:
    """Raise `InputError` where `what` needs more bytes than a device has left beside those that it holds already."""
    available = memory_available()
    if available is not None and needed > (available := available + held):
        at = f" at grid size {grid_size[0]}" if grid_size else ""
        smaller = " or ".join([*smaller, "data.shape", *(["grid size"] if grid_size else [])])
        raise InputError(
            f"{what}{at} needs {needed / 2**30:.1f} GiB a device, and {available / 2**30:.1f} GiB are free: "
            f"a smaller {smaller} would need less"
        )


def bytes_held(arrays) -> int:
    """Memory that a tree of arrays takes of a device, as much on each that holds a part of it."""
    import jax

    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(arrays))


def bytes_needed(program) -> int:
    """Peak memory of a program: arguments, temporaries, and outputs that do not take the place of arguments."""
    sizes = program.memory_analysis()
    if sizes is None:  # not every backend tells
        return 0
    return (
        sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    )


def memory_available() -> int | None:
    """Bytes that a device may still take; None where the platform does not tell. On the CPU, what is free (and, in a
    container or a job of a cluster, still granted) divided by the devices."""
    import jax  # not above: what is allocated from the start is to go by `limit_freed_memory`

    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if device.platform == "cpu":
        return min(psutil.virtual_memory().available, left_to_group()) // jax.local_device_count()
    return None


def left_to_group(mounted: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> int | float:
    """Bytes that a container, or a cluster's job, still leaves to this process; infinite where nothing limits it.

    Files that a group has read lately count as its memory, but make room.

    Args:
      mounted: where Linux shows control groups, of version 1 or 2.
      groups: which ones the process is in.
    """
    left = math.inf
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used, files = mounted, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, files = mounted / "memory", "total_inactive_file"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *own.parents[: len(own.parts) - len(root.parts)]):
            with contextlib.suppress(OSError, ValueError, KeyError):  # no such file or line, or no limit ("max")
                numbers = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                most, taken = (int((folder / name).read_text()) for name in (limit, used))
                left = min(left, max(0, most - taken + int(numbers[files])))
    return left


def _glibc():
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None
