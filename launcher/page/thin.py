"""A series of any length made as short as a picture can show, and its mean over the last steps.

A picture has COLUMNS columns; of each the smallest and the largest value stay, in the order in which they came. So a
spike of one step in a million is there, as high as it was.
"""

import numpy as np

COLUMNS = 600  # of a picture
SHARE = 50  # a mean is taken over one in so many steps
FEWEST = 5  # but over so many at least

Span = tuple[float, float]  # the first and the last step that a picture shows


def spot(steps: np.ndarray, span: Span, columns: int = COLUMNS) -> np.ndarray:
    """[N] -> [N]: the column that each step is in."""
    first, last = span
    places = (np.asarray(steps, dtype=np.float64) - first) / max(1.0, last - first) * columns
    return np.clip(places.astype(np.int64), 0, columns - 1)


def thin(steps: np.ndarray, values: np.ndarray, span: Span) -> list[np.ndarray]:
    """Pieces [n, 2] of (step, value), cut where values are not finite; of a long series, where none of a column is."""
    finite, columns = np.isfinite(values), spot(steps, span)
    if len(steps) <= 2 * COLUMNS:
        columns, kept = np.arange(len(steps)), np.flatnonzero(finite)
    else:
        kept = _find_extremes(values, columns, np.flatnonzero(finite))
    if not len(kept):
        return []
    empty = np.setdiff1d(columns, columns[finite])
    cuts = np.flatnonzero(np.diff(np.searchsorted(empty, columns[kept]))) + 1
    return np.split(np.stack([steps[kept], values[kept]], axis=1), cuts)


def _find_extremes(values: np.ndarray, columns: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """Where in each column the smallest and the largest of the ``finite`` values are, ascending."""
    kept: set[int] = set()
    for part in np.split(finite, np.flatnonzero(np.diff(columns[finite])) + 1):
        if len(part):
            kept |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
    return np.array(sorted(kept), dtype=np.int64)


def smooth(values: np.ndarray, steps: int) -> np.ndarray:
    """[N] -> [N]: at each step the mean of what is finite among the last ``steps``; NaN where the step is not.

    Early on it is of fewer, of a quarter of those so far, or it would lag behind a loss that falls fast.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    ends = np.arange(1, len(values) + 1)
    starts = ends - np.clip(ends // 4, 1, steps)
    return np.where(finite, (sums[ends] - sums[starts]) / np.maximum(1, counts[ends] - counts[starts]), np.nan)


def choose_window(steps: int) -> int:
    """Over how many steps a mean is taken in a run that has taken so many; 1: not worth it."""
    return max(FEWEST, steps // SHARE) if steps >= 4 * FEWEST else 1


def squeeze(table: np.ndarray, columns: int, usual: float = 0.0) -> np.ndarray:
    """[R, C] -> [R, at most ``columns``]: of neighbours what is farthest from ``usual``."""
    if table.shape[1] <= columns:
        return table
    parts = np.array_split(np.arange(table.shape[1]), columns)
    chosen = [
        np.take_along_axis(table[:, part], np.abs(table[:, part] - usual).argmax(axis=1)[:, None], axis=1)
        for part in parts
    ]
    return np.concatenate(chosen, axis=1)
