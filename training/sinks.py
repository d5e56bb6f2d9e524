"""Copies of the record for those who watch runs elsewhere: TensorBoard and Weights & Biases.

A package is imported only when its sink is chosen. Rows of kind "step" and "eval" become scalars named ``kind/field``;
those of kind "start" become the run's description. A run that goes on goes on there, too: TensorBoard hides what is
taken again, Weights & Biases keeps what it had first, which is the same.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from training.config import Sink
from training.metrics import Record, Writer


class TensorBoard:
    """Event files in ``<run folder>/tensorboard``."""

    def __init__(self, folder: Path) -> None:
        _require(Sink.tensorboard)
        self._folder = str(folder / "tensorboard")
        self._writer: Any = None  # until the step is known that the run begins with

    def rewind(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self._writer = SummaryWriter(self._folder, purge_step=step)

    def write(self, row: dict[str, Any]) -> None:
        if row["kind"] == "start":
            self._writer.add_text("start", json.dumps(row))
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run named like the folder, where its id stays. Project, entity and offline mode come from wandb's own
    environment variables."""

    def __init__(self, folder: Path) -> None:
        _require(Sink.wandb)
        import wandb

        known = folder / "wandb-id.txt"
        id = known.read_text(encoding="utf-8") if known.is_file() else None
        self._run = wandb.init(name=folder.name, dir=str(folder), id=id, resume="allow")
        known.write_text(self._run.id, encoding="utf-8")

    def rewind(self, step: int) -> None:
        """Nothing: steps that are there are not taken a second time."""

    def write(self, row: dict[str, Any]) -> None:
        if row["kind"] == "start":
            facts = {key: value for key, value in row.items() if key != "kind"}
            self._run.config.update(facts, allow_val_change=True)  # a run may go on in another layout
        if found := scalars(row):
            self._run.log(found, step=row["step"])

    def close(self) -> None:
        self._run.finish()


SINKS: dict[Sink, Callable[[Path], Writer]] = {Sink.tensorboard: TensorBoard, Sink.wandb: WeightsAndBiases}


def open_sinks(sinks: Iterable[Sink], folder: Path) -> list[Writer]:
    """A writer for each of ``run.sinks``. ValueError, with what to install, where its package is missing."""
    return [SINKS[sink](folder) for sink in sinks]


def open_record(sinks: Iterable[Sink], folder: Path, kept: bool = True, prometheus: str | None = None) -> Record:
    """The record of a run in ``folder``, and its sinks, of which one may answer at the address ``prometheus``; one that
    goes nowhere if it is not to be ``kept``. Raises ValueError also where that cannot be listened at."""
    if not kept:
        return Record(Path(os.devnull))
    writers = open_sinks(sinks, folder)
    if prometheus is not None:
        from training.prometheus import Prometheus

        writers.append(Prometheus(prometheus, folder))
    return Record(folder / "metrics.jsonl", writers)


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a step's or an evaluation's row as ``kind/field``, one for each entry of a list."""
    if row["kind"] not in ("step", "eval"):
        return {}
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, int | float) and name != "step":
            found[f"{row['kind']}/{name}"] = float(value)
        elif isinstance(value, list | tuple):
            found |= {f"{row['kind']}/{name}/{index}": float(item) for index, item in enumerate(value)}
    return found


def _require(sink: Sink) -> None:
    if importlib.util.find_spec(sink.value) is None:
        raise ValueError(f"run.sinks: {sink} needs a package that is not installed: pip install 'shoestring[{sink}]'")
