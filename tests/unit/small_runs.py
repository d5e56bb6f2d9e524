"""Runs small enough for a test: a model of a few thousand parameters on a page of text."""

from pathlib import Path
from typing import Any

from small_mesh import alone
from small_models import make_config

from configs.schema import TrainConfig
from model.config import ModelConfig
from training.config import OptimizerConfig, Precision, RunSection, SamplingConfig
from training.data.config import DataConfig
from training.setup import Setup, set_up

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "naïve", "wizards", "box")


def write_text(folder: Path, words: int = 3000) -> None:
    """A page of words in an order that a model can learn a little about."""
    (folder / "text.txt").write_text(" ".join(WORDS[(3 * i + i // 7) % len(WORDS)] for i in range(words)))


def make_run(
    folder: Path,
    *,
    model: ModelConfig | None = None,
    optimizer: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    precision: Precision = Precision.fp32,
    **run: Any,
) -> TrainConfig:
    """Six steps of 8 sequences of 16 bytes in micro-batches of 4, on one thread, with single fields changed.

    The text is ``folder/text.txt``: see ``write_text``."""
    values = {"name": "small", "steps": 6, "global_batch": 8, "micro_batch": 4, "threads": 1, "eval_tokens": 256}
    return TrainConfig(
        model=model or make_config(vocab_size=264, mtp=1),
        data=DataConfig(
            **{
                "sequence_length": 16,
                "corpus": (str(folder / "text.txt"),),
                "folder": str(folder / "data"),
                "workers": 1,
                **(data or {}),
            }
        ),
        optimizer=OptimizerConfig(**{"lr": 1e-2, **(optimizer or {})}),
        precision=precision,
        run=RunSection(**{**values, "sample": SamplingConfig(prompt="the ", tokens=12), **run}),
    )


def open_run(config: TrainConfig) -> Setup:
    """A run that is ready to take its first step, as the only rank, in silence."""
    return set_up(config, lambda line: None, alone())
