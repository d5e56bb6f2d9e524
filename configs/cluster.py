"""Configuration of the cluster and of submission to it: only the launcher sees these."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """The machines a run is given."""

    name: str = "local"
    devices_per_node: int = 8  # ranks that share a machine, and its fast links
    price_per_device_hour: float = 0.0  # in whatever currency you think in

    def __post_init__(self) -> None:
        if self.devices_per_node < 1:
            raise ValueError(f"cluster.devices_per_node={self.devices_per_node} must be at least 1")
        if self.price_per_device_hour < 0:
            raise ValueError(f"cluster.price_per_device_hour={self.price_per_device_hour} must not be negative")
