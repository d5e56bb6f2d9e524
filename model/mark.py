"""Names in a profile: whatever runs inside ``with mark(name)`` is a range of that name where one is being taken."""

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler

NOTHING = nullcontext()


def mark(name: str, *about: object) -> AbstractContextManager[object]:
    """A range called ``name``, with ``about`` behind it; nothing where no profile is being taken."""
    return profiler.record_function(" ".join((name, *map(str, about)))) if profiler._is_profiler_enabled else NOTHING
