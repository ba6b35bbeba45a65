"""What the C library does with freed buffers: glibc keeps most of them, in each thread.

What is kept so grows with the machine's cores. Elsewhere nothing happens.
"""

import ctypes

LARGE_BYTES = 2**20
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def give_back() -> None:
    """Return what was freed to the system now."""
    _call("malloc_trim", 0)


def give_back_at_once() -> None:
    """Return every large buffer when it is freed, from now on and in all threads.

    It costs zeroing the pages of new ones: for programs that have a bound to keep.
    """
    _call("mallopt", _M_MMAP_THRESHOLD, LARGE_BYTES)


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, name):
        getattr(libc, name)(*arguments)
