"""``shoestring generate <run>``: text from a run's weights, as it is drawn."""

import sys
from dataclasses import dataclass

from launcher import cli, folder
from launcher.invocation import Invocation
from training.config import Device, SamplingConfig

SUMMARY = "continue a prompt with the model of a run"
ARGUMENTS = ("run",)


@dataclass(kw_only=True, slots=True)
class Config(SamplingConfig):
    """What to draw, and where."""

    folder: str = "runs"  # where runs are looked for by their id
    device: Device = Device.auto
    threads: int | None = None  # null: all cores


def run(config: Config, invocation: Invocation) -> int:
    """Streams the prompt and what the model makes of it to standard output."""
    found = folder.open(invocation.arguments[0], config.folder)
    trained = folder.load_config(found.path)
    # Loads torch: only once the run is known to be there.
    from training.generate import continue_text, show_controls
    from training.restore import restore

    model, tokenizer = restore(trained, found.weights, config.device, config.threads)
    print(config.prompt, end="", flush=True)
    for piece in continue_text(model, tokenizer, config):
        print(show_controls(piece) if sys.stdout.isatty() else piece, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["generate", *sys.argv[1:]]))
