"""A limit of memory for code that reads what strangers wrote."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOM = 256 << 20  # bytes of address space


@contextmanager
def little_memory() -> Iterator[None]:
    """Allocating much more than small files need fails in here."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
