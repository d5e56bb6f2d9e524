"""A file that is written from end to end past the cache of the machine: nobody reads a checkpoint soon.

    content --> 8 MiB of memory that begins at a page --> the disk (O_DIRECT)

The cache would take the time of a copy, and the room of what others read; and a disk that gets everything at the end
has been idle until then. Where a file system knows of no such thing, through the cache.
"""

import mmap
import os
from typing import Any

SIZE = 2**23  # bytes on hand
ALIGNED = 2**12  # bytes: sizes and places on the disk are multiples of it, or go through the cache


class Direct:
    """Bytes on their way to ``path``. Errors of the disk come up to ``SIZE`` bytes late: ``position`` says where."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Makes it, or makes it empty."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
        self._direct = getattr(os, "O_DIRECT", 0)
        try:
            self._file = os.open(path, flags | self._direct, 0o666)
        except OSError:  # not here, or not at all, which is said now
            self._direct = 0
            self._file = os.open(path, flags, 0o666)
        self._memory = memoryview(mmap.mmap(-1, SIZE))
        self._filled, self.position = 0, 0  # bytes on hand, and on the disk

    def write(self, content: Any) -> int:
        """All of ``content``, now or with what follows. Returns the number of its bytes."""
        left = memoryview(content).cast("B")
        size = len(left)
        while len(left):
            part = left[: SIZE - self._filled]
            self._memory[self._filled : self._filled + len(part)] = part
            self._filled, left = self._filled + len(part), left[len(part) :]
            if self._filled == SIZE:
                self._flush()
        return size

    def finish(self) -> None:
        """Returns when all of it is on the disk."""
        self._flush()
        os.fsync(self._file)

    def close(self) -> None:
        """What is still on hand is forgotten."""
        os.close(self._file)

    def _flush(self) -> None:
        at = 0
        while at < self._filled:
            rest = self._memory[at : self._filled]
            try:
                done = os.write(self._file, rest if len(rest) % ALIGNED == 0 else self._cut(rest))
            except OSError:
                if not self._direct:
                    raise
                self._go_through_cache()  # where it is said again, if it was not about that
                continue
            at, self.position = at + done, self.position + done
            if self.position % ALIGNED:
                self._go_through_cache()
        self._filled = 0

    def _cut(self, rest: memoryview) -> memoryview:
        """What of the end of a file can go past the cache; all of it where nothing can."""
        aligned = len(rest) // ALIGNED * ALIGNED if self._direct else 0
        if not aligned:
            self._go_through_cache()
        return rest[: aligned or len(rest)]

    def _go_through_cache(self) -> None:
        if self._direct:
            import fcntl  # where there is O_DIRECT, there is this

            fcntl.fcntl(self._file, fcntl.F_SETFL, fcntl.fcntl(self._file, fcntl.F_GETFL) & ~self._direct)
            self._direct = 0
