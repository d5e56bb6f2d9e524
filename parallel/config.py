"""Configuration of the parallel layout: the five degrees."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How many ways each axis splits the work. ``dp`` defaults to what the other axes leave of the world."""

    pp: int = 1  # pipeline stages
    dp: int | None = None  # data-parallel replicas
    cp: int = 1  # context: a sequence over ranks
    tp: int = 1  # tensor: a layer over ranks
    ep: int = 1  # expert: routed experts over dp * cp * tp ranks

    def __post_init__(self) -> None:
        for axis in ("pp", "dp", "cp", "tp", "ep"):
            degree = getattr(self, axis)
            if degree is not None and degree < 1:
                raise ValueError(f"parallel.{axis}={degree} must be at least 1")
            if degree is not None and degree > 1:
                raise ValueError(f"parallel.{axis}={degree} must be 1: only one process is supported so far")
