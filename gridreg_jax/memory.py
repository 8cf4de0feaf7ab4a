"""Memory of the process: what a container leaves to it, and what the C library's allocator keeps (glibc alone)."""

import contextlib
import ctypes
import gc
import math
from pathlib import Path

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
