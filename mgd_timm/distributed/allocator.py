"""Memory that the C library keeps for the next step: on a CPU, mapping it anew takes a good part of a step."""

import ctypes
import sys

# mallopt's numbers in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Let freed tensors' memory be used again instead of returning it to the system; return whether that was possible.

    By default glibc maps every block above 32 MB anew and unmaps it when it is freed. A step's activations are such
    blocks, so that each step has the system clear and map gigabytes. The process keeps what it has used once, so its
    peak is somewhat higher. `benchmarks/allocator.py` measures both. Other C libraries are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl has none
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30) and mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))
