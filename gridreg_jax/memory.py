"""What the C library's allocator keeps of freed memory (glibc; elsewhere nothing is done)."""

import ctypes
import gc

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
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE)


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
