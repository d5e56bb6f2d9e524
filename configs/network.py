"""Configuration of how ranks talk to each other, as the libraries that carry it read it. Standard library only.

Each key is an environment variable of gloo or NCCL; null leaves what the environment has. A run that is to give the
same bits again has to add in the same order again: what changes that is among these, and so is configuration.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple


class Variable(NamedTuple):
    """What a key stands for."""

    names: tuple[str, ...]
    why: str


INTERFACE = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
VARIABLES = {
    "interface": Variable(INTERFACE, "of several networks, one may be guessed that other machines do not reach"),
    "ib_hca": Variable(("NCCL_IB_HCA",), "adapters for storage or management are InfiniBand, too, and slower"),
    "ib_gid_index": Variable(("NCCL_IB_GID_INDEX",), "over Ethernet (RoCE) 3 is usually the one that is routed"),
    "ib_timeout": Variable(("NCCL_IB_TIMEOUT",), "4.1 us * 2^n: the longer, the longer a detour in a switch may take"),
    "nccl_algorithm": Variable(("NCCL_ALGO",), "else NCCL's choice, which changes with the machines, and bits with it"),
    "nccl_protocol": Variable(("NCCL_PROTO",), "the same"),
    "nccl_debug": Variable(("NCCL_DEBUG",), "INFO says which of all of these was taken"),
    "trace": Variable(("TORCH_FR_BUFFER_SIZE",), "collectives that torch remembers, to show where a rank hangs"),
}


@dataclass(kw_only=True, slots=True)
class NetworkConfig:
    """What ranks use to talk to each other."""

    interface: str | None = None  # null: the one that leads to the first rank
    ib_hca: str | None = None  # as mlx5_0,mlx5_1, or ^mlx5_bond_0 for all but that
    ib_gid_index: int | None = None
    ib_timeout: int | None = None
    nccl_algorithm: str | None = None  # Ring or Tree
    nccl_protocol: str | None = None  # LL, LL128 or Simple
    nccl_debug: str | None = None  # WARN or INFO
    trace: int = 2000  # 0: none

    def __post_init__(self) -> None:
        for name in VARIABLES:
            value = getattr(self, name)
            if isinstance(value, str) and not re.fullmatch(r"[\w^=,.:-]+", value):
                raise ValueError(f"network.{name}={value} must be letters, digits and ^ = , . : - _")
            if isinstance(value, int) and value < 0:
                raise ValueError(f"network.{name}={value} must not be negative")

    def variables(self) -> dict[str, str]:
        """What is to be set in a rank's environment."""
        found = {key: getattr(self, key) for key in VARIABLES}
        return {name: str(value) for key, value in found.items() if value is not None for name in VARIABLES[key].names}
