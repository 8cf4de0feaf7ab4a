"""What the C library's allocator keeps of freed memory (glibc; elsewhere nothing is done)."""

import ctypes
import gc

# malloc.h
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
# Bytes from which a block is mapped for itself. Left alone, glibc would raise it to 32 MiB.
_LARGE = 4 * 2**20


def limit_freed_memory() -> None:
    """Keep little of what is freed: volumes go back to the system at once, and all threads share one pool.

    With freed volumes kept, a training holds an eighth more; with a pool for each thread, up to a fifth.
    """
    libc = _glibc()
    if libc:
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)


def return_freed_memory() -> None:
    """Give what is freed back to the system."""
    gc.collect()
    libc = _glibc()
    if libc:
        libc.malloc_trim(0)


def _glibc():
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None
