"""The profile of ranks that share experts: in an overlapped pair, one micro-batch travels while the other computes."""

import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import product
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from small_models import make_config
from small_runs import make_run
from spawn import run_ranks

from configs.schema import TrainConfig
from parallel.config import EngineName, ParallelConfig, PipelineConfig, ScheduleName
from parallel.mesh import Mesh
from parallel.topology import Topology
from training.config import ProfileConfig
from training.loop import train_on
from training.metrics import read

Event = dict[str, Any]
LAYOUT = Topology(dp=2, ep=2)
COMPUTE, NETWORK = 2, 3


def train_rank(rank: int, world: int, topology: Topology, config: TrainConfig, folder: str) -> str:
    """A run on one rank; what it printed."""
    with redirect_stdout(StringIO()) as shown:
        train_on(Mesh(topology, torch.device("cpu")), config, Path(folder))
    return shown.getvalue()


def run(
    folder: Path, steps: str | None, topology: Topology = LAYOUT, mtp: int = 1, **parallel: Any
) -> tuple[list[Any], Path, str]:
    """Three steps of four micro-batches on each rank: losses and norms, the run's folder, and what rank 0 printed."""
    config = make_run(
        folder, model=make_config(vocab_size=264, num_layers=4, mtp=mtp), steps=3, micro_batch=1, eval_tokens=32
    )
    config.parallel = ParallelConfig(pp=topology.pp, dp=topology.dp, ep=topology.ep, **parallel)
    config.profile, config.checkpoint.save, config.run.sample.tokens = ProfileConfig(steps=steps), False, 0
    own = Path(mkdtemp(dir=folder))
    said = run_ranks(train_rank, topology.world, topology, config, str(own))
    rows = read(own / "metrics.jsonl", "step")
    return [[row[key] for key in ("loss", "mtp_losses", "aux", "grad_norm")] for row in rows], own, said[0]


def open_trace(own: Path) -> list[Event]:
    return json.loads((own / "profile" / "trace.json").read_text())["traceEvents"]


def of_rank(events: list[Event], rank: int) -> list[Event]:
    return [event for event in events if event["ph"] == "X" and event["pid"] == rank]


def find_hidden(events: list[Event]) -> Iterator[tuple[str, str]]:
    """What travels, from launch to landing, with each computation of another micro-batch that lies within."""
    segments = [event for event in events if event["tid"] == COMPUTE and event["cat"] in ("forward", "backward")]
    flights = [event for event in events if event["tid"] >= NETWORK and event["cat"] in ("forward", "backward")]
    for flight, segment in product(flights, segments):
        inside = flight["ts"] <= segment["ts"] and segment["ts"] + segment["dur"] <= flight["ts"] + flight["dur"]
        if inside and flight["args"]["micro-batch"] != segment["args"]["micro-batch"]:
            yield flight["name"], segment["name"]


def test_pairs_travel_under_each_other(text: Path) -> None:
    overlapped = {"pipeline": PipelineConfig(schedule=ScheduleName.interleaved_1f1b_overlap)}
    _, own, said = run(text, "2", **overlapped)
    assert f"profile of steps 2 in {own / 'profile' / 'trace.json'}" in said
    assert {path.name for path in (own / "profile").iterdir()} == {
        "trace.json", "memory.json", "rank-0.json.gz", "rank-1.json.gz",
    }  # fmt: skip
    events = open_trace(own)
    assert [event["name"] for event in events if event.get("cat") == "step"] == ["step 2"] * 2
    for rank in (0, 1):
        mine = of_rank(events, rank)
        named = {event["name"] for event in mine if event["tid"] == COMPUTE}
        parts = ("attention", "announce", "dispatch", "shared", "arrive", "experts", "combine", "collect", "merge")
        assert named >= {f"layers.1.{part} F{i}" for part in parts for i in range(4)} | {"embedding F0", "losses F3"}
        assert named >= {f"layers.1.{part} B{i}" for part in ("attention", "experts", "shared") for i in range(4)}
        assert named >= {"weights W0", "waits"}
        assert [event["name"] for event in mine if event["cat"] == "action"] == [
            "0F0", "0F1&0B0", "0F2&0B1", "0F3&0B2", "0B3", "0W3",
        ]  # fmt: skip
        assert {event["name"] for event in mine if event["cat"] == "travels"} >= {"gloo:recv", "gloo:all_reduce"}
        hidden = set(find_hidden(mine))
        # The order of the two programs alone says so: which of them is faster does not matter.
        assert ("layers.1.dispatch F1", "mtp.0.experts B0") in hidden
        assert ("mtp.0.collect B0", "layers.1.attention F1") in hidden


@pytest.mark.parametrize("engine", [EngineName.fsdp2, EngineName.zero1, EngineName.zero3], ids=str)
@pytest.mark.full
def test_other_engines(text: Path, engine: EngineName) -> None:
    topology, mtp = (Topology(dp=2), 0) if engine is EngineName.zero3 else (LAYOUT, 1)
    losses, own, _ = run(text, "2-3", topology, mtp, engine=engine)
    assert losses == run(text, None, topology, mtp, engine=engine)[0]
    for rank in (0, 1):
        mine = of_rank(open_trace(own), rank)
        named = {event["name"] for event in mine if event["tid"] == COMPUTE}
        assert named >= {f"{part} {op}{i}" for part in ("layers.1.experts", "head") for op in "FB" for i in range(4)}
        assert any(event["cat"] == "travels" for event in mine)


@pytest.mark.full
def test_stages_send_each_other(text: Path) -> None:
    """A profile changes no number; messages between stages are there, and what was simulated for each of them."""
    pipeline = {"pipeline": PipelineConfig(schedule=ScheduleName.dualpipev), "topology": Topology(pp=2)}
    losses, own, _ = run(text, "2", **pipeline)
    assert losses == run(text, None, **pipeline)[0]
    events = open_trace(own)
    for rank in (0, 1):
        mine = of_rank(events, rank)
        assert {event["name"] for event in mine} >= {"gloo:send", "gloo:recv"}
        simulated, done = (
            [event["name"] for event in mine if event["tid"] == row and event["cat"] != "step"] for row in (0, 1)
        )
        assert simulated == done
