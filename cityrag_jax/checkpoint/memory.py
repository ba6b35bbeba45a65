"""Memory that a process holds beside its data, and how to have less of it.

glibc keeps most buffers that are freed, and each thread that copies has some of its
own, so that both grow with the machine's cores. Elsewhere nothing happens.
"""

import ctypes
import os

CORES = 8
LARGE_BYTES = 2**20
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def give_back() -> None:
    """Return what was freed to the system now."""
    _call("malloc_trim", 0)


def stay_small() -> None:
    """Bound what is held beside the data on a machine of any size.

    Large buffers return to the system when they are freed, in all threads, which costs
    zeroing the pages of new ones; and threads that start from now on share few cores.
    For the beginning of a program that has a bound to keep.
    """
    _call("mallopt", _M_MMAP_THRESHOLD, LARGE_BYTES)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, name):
        getattr(libc, name)(*arguments)
