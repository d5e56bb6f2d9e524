"""``shoestring export <run> to=<folder>``: a run's weights in Hugging Face format, one tensor in memory at a time."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.schema import RunConfig
from launcher import cli, folder
from launcher.invocation import Invocation

if TYPE_CHECKING:
    from model.huggingface import Source

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
    from training.save import open_saved

    write(open_saved(found.weights), trained, config)
    print(f"{found.path} is in {config.to}")
    return 0


def write(source: "Source", trained: RunConfig, config: Config) -> None:
    """Exports the weights in ``source``, those of the run ``trained``. ValueError as ``model.huggingface.export``."""
    from model.huggingface import export
    from training.data.tokenizer import load_tokenizer

    eos = load_tokenizer(trained.data.tokenizer, trained.data.eos).eos
    export(source, trained.model, Path(config.to), int(config.shard_gigabytes * 1e9), eos, config.fp8)


if __name__ == "__main__":
    sys.exit(cli.main(["export", *sys.argv[1:]]))
