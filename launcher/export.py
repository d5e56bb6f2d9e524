"""``shoestring export <run> to=<folder>``: a run's weights in Hugging Face format, one tensor in memory at a time."""

import sys
from dataclasses import dataclass
from pathlib import Path

from launcher import cli, folder
from launcher.invocation import Invocation

SUMMARY = "write the weights of a run in Hugging Face format"
ARGUMENTS = ("run",)


@dataclass(kw_only=True, slots=True)
class Config:
    """Where from and where to."""

    to: str  # a folder that does not exist yet, or is empty
    folder: str = "runs"  # where runs are looked for by their id
    shard_gigabytes: float = 5.0  # bytes of tensors in a file
    fp8: bool = False  # projections in 8 bits with scales, as DeepSeek-V3 was published

    def __post_init__(self) -> None:
        if self.shard_gigabytes <= 0:
            raise ValueError(f"shard_gigabytes={self.shard_gigabytes} must be positive")


def run(config: Config, invocation: Invocation) -> int:
    """Writes ``config.json``, the safetensors files and their index to ``config.to``."""
    found = folder.open(invocation.arguments[0], config.folder)
    trained = folder.load_config(found.path)
    # Loads torch: only once the run is known to be there.
    from model.huggingface import export
    from training.data.tokenizer import load_tokenizer
    from training.save import open_saved

    eos = load_tokenizer(trained.data.tokenizer, trained.data.eos).eos
    shard = int(config.shard_gigabytes * 1e9)
    export(open_saved(found.weights), trained.model, Path(config.to), shard, eos, config.fp8)
    print(f"{found.path} is in {config.to}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["export", *sys.argv[1:]]))
