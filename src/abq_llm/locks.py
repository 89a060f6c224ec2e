"""A folder for one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from abq_llm.errors import AbqError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make the folder if it is not there and hold it; however this process ends, it lets go. Empty, it is removed.

    Raises:
        AbqError: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AbqError(f"{directory}: another process is at work in it") from None
        try:
            yield
        finally:
            with suppress(OSError):  # it is not empty, or gone
                directory.rmdir()
    finally:
        os.close(handle)
