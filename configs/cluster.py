"""Configuration of the cluster and of submission to it: only the launcher sees these."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """The machines a run is given."""

    name: str = "local"
    price_per_device_hour: float = 0.0  # in whatever currency you think in

    def __post_init__(self) -> None:
        if self.price_per_device_hour < 0:
            raise ValueError(f"cluster.price_per_device_hour={self.price_per_device_hour} must not be negative")
