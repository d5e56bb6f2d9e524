"""``shoestring upcycle <folder> to=<folder>``: a dense model in Hugging Face format becomes one with experts."""

import sys
from dataclasses import dataclass
from pathlib import Path

from launcher import cli
from launcher.invocation import Invocation
from model.upcycle_config import UpcycleConfig

SUMMARY = "make a model with experts of a dense one in Hugging Face format; it computes the same"
ARGUMENTS = ("folder",)


@dataclass(kw_only=True, slots=True)
class Config(UpcycleConfig):
    """Which experts, and where to."""

    to: str  # a folder that does not exist yet, or is empty
    shard_gigabytes: float = 5.0  # bytes of tensors in a file


def run(config: Config, invocation: Invocation) -> int:
    """Writes the folder, and says how a run begins with it."""
    (published,) = invocation.arguments
    # Loads torch: only once the words are known to be good.
    from model.upcycle import upcycle

    made = upcycle(Path(published), Path(config.to), config, int(config.shard_gigabytes * 1e9))
    print(f"{published} with {made.moe.experts} experts a layer, {made.moe.top_k} of them a token, is in {config.to}")
    words = {
        "model.dense_layers": made.dense_layers,
        **{f"model.moe.{name}": getattr(made.moe, name) for name in ("experts", "top_k", "ffn", "score", "bias_speed")},
        "init_from": config.to,
    }
    print("a run begins with it by the words of the dense model, and", " ".join(f"{k}={v}" for k, v in words.items()))
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["upcycle", *sys.argv[1:]]))
