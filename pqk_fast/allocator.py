"""glibc's malloc settings for training on the CPU."""

from __future__ import annotations

import ctypes
import os
import platform

# mallopt's parameters in glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEEP_BYTES = 1 << 30


def recycle_large_tensors() -> bool:
    """Let malloc keep freed memory up to 1 GiB for the next tensor, instead of returning it to the system.

    By default glibc maps every large tensor anew, and each of its pages then faults at first touch: about a fifth of a
    small network's training step on the CPU. For the whole process, and from now on. True if it was set; False without
    glibc, or if the environment has ``PQK_FAST_MALLOC=default``.
    """
    if platform.libc_ver()[0] != "glibc" or os.environ.get("PQK_FAST_MALLOC") == "default":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_THRESHOLD, _KEEP_BYTES), (_M_TRIM_THRESHOLD, _KEEP_BYTES), (_M_TOP_PAD, 64 << 20))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
