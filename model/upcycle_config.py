"""What ``shoestring upcycle`` makes of a dense model. Standard library only."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class UpcycleConfig:
    """The experts that each feed-forward network becomes."""

    experts: int = 8
    top_k: int = 2
    split: int = 1  # parts that a network is cut into; experts and top_k count parts
    dense_layers: int = 0  # leading layers that stay as they are
    seed: int = 0  # of the routers

    def __post_init__(self) -> None:
        for name in ("experts", "top_k", "split"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("experts", "top_k"):
            if getattr(self, name) % self.split:
                raise ValueError(f"split={self.split} must divide {name}={getattr(self, name)}: parts go together")
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} must not exceed experts={self.experts}")
        if self.dense_layers < 0:
            raise ValueError(f"dense_layers={self.dense_layers} must not be negative")
