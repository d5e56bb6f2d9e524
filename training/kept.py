"""Where the weights lie that a run has left. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kept:
    """Those of a checkpoint, or the last ones."""

    place: str  # a checkpoint's folder or URL, or a folder of last weights
    step: int  # so many were taken
    checkpoint: bool = True  # it is one
    average: bool = False  # of a checkpoint, the moving average of the weights
