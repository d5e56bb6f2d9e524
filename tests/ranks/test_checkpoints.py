"""A checkpoint of any layout loads into any other: the steps that follow are those of a run that was never cut off.

The same layout gives the same bits; another one the numbers of one process, in float64.
"""

import random
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from small_models import GROUPED, make_config
from small_runs import make_run, write_text
from spawn import run_ranks

from configs.schema import TrainConfig
from parallel.config import EngineName, ParallelConfig, PipelineConfig, ScheduleName
from parallel.mesh import Mesh
from parallel.topology import Topology
from training.checkpoint.folders import find, read_manifest
from training.checkpoint.weights import open_weights
from training.config import Precision
from training.loop import train_on
from training.metrics import read
from training.support import DEEPSPEED

# Families by what differs: attention, and which layers route.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "latent": ({"heads": 4}, {}),
    "grouped": (GROUPED | {"heads": 4, "qk_norm": True, "bias": True, "nope_dim": 2}, {"every": 2}),
}
CUT, STEPS = 4, 6  # the run that goes on takes the steps behind ``CUT``


class Layout(NamedTuple):
    """How ranks share the model, and which optimizer they have."""

    topology: Topology = Topology()
    schedule: str = "1f1b"
    virtual: int = 1
    engine: EngineName = EngineName.native
    moving: int = 0  # steps between moves of experts to other ranks
    family: str = "latent"

    def __str__(self) -> str:
        t = self.topology
        moving = f" moving{self.moving}" if self.moving else ""
        layout = f"pp{t.pp} {self.schedule}{self.virtual} dp{t.dp} tp{t.tp} ep{t.ep} {self.engine}{moving}"
        return layout if self.family == "latent" else f"{self.family} {layout}"

    def parallel(self) -> ParallelConfig:
        """In keys."""
        t = self.topology
        return ParallelConfig(
            pp=t.pp,
            dp=t.dp,
            tp=t.tp,
            ep=t.ep,
            engine=self.engine,
            pipeline=PipelineConfig(schedule=ScheduleName(self.schedule), virtual=self.virtual),
            rebalance_every=self.moving,
        )


LAYOUTS = [
    Layout(),
    Layout(Topology(dp=2, ep=2), moving=3),
    Layout(Topology(dp=2, tp=2, ep=4)),
    Layout(Topology(pp=2, dp=2, ep=2), moving=1),
    Layout(Topology(pp=2), "zb_v"),
    Layout(Topology(pp=2), "dualpipe"),
    Layout(Topology(dp=3), engine=EngineName.fsdp2),
]
WIDE = [
    *LAYOUTS,
    Layout(Topology(dp=4, ep=4), moving=2),
    Layout(Topology(dp=2, tp=2, ep=2), engine=EngineName.fsdp2),
    Layout(Topology(pp=2, dp=2), "interleaved_1f1b", 2),
    Layout(Topology(pp=2, tp=2), "dualpipev"),
    Layout(Topology(pp=4), "zb_h1"),
    Layout(Topology(pp=2, dp=2, tp=2, ep=2)),
    Layout(Topology(dp=2, ep=2), engine=EngineName.zero1),
    Layout(Topology(dp=3), engine=EngineName.zero2),
    Layout(Topology(dp=2), engine=EngineName.zero3),
]


def draw_pairs(layouts: list[Layout], count: int, seed: int) -> list[tuple[Layout, Layout]]:
    """Each layout as often as any other, on both sides; some of the pairs are of the same one twice."""
    generator, pairs = random.Random(seed), list[tuple[Layout, Layout]]()  # noqa: S311 (no secret)
    while len(pairs) < count:
        others = generator.sample(layouts, len(layouts))
        pairs += [pair for pair in zip(layouts, others, strict=True) if pair not in pairs]
    return pairs[:count]


def choose_precision(*layouts: Layout) -> Precision:
    """Float64, but where DeepSpeed's engines are, which have none."""
    narrow = any(layout.engine in DEEPSPEED for layout in layouts)
    return Precision.fp32 if narrow else Precision.fp64


def make(text: Path, layout: Layout, precision: Precision) -> TrainConfig:
    attention, moe = FAMILIES[layout.family]
    config = make_run(
        text,
        model=make_config(
            vocab_size=264,
            num_layers=4,
            mtp=1,
            attention=attention,
            moe={"experts": 8, "groups": 4, "top_groups": 2, **moe},
        ),
        precision=precision,
        steps=STEPS,
        global_batch=12,
        micro_batch=2,
    )
    config.parallel, config.run.sample.tokens = layout.parallel(), 0
    config.checkpoint.every, config.checkpoint.keep, config.optimizer.ema = CUT, STEPS, 0.7
    return config


def train_rank(rank: int, world: int, topology: Topology, config: TrainConfig, folder: str) -> str:
    """A run on one rank: what it printed."""
    with redirect_stdout(StringIO()) as shown:
        train_on(Mesh(topology, torch.device("cpu")), config, Path(folder))
    return shown.getvalue()


def run(text: Path, layout: Layout, precision: Precision, folder: Path) -> str:
    """Trains to the end, from wherever ``folder`` has come to: what rank 0 printed."""
    shown: str = run_ranks(
        train_rank, layout.topology.world, layout.topology, make(text, layout, precision), str(folder)
    )[0]
    return shown


def rows(folder: Path) -> list[dict[str, Any]]:
    """Of the steps, without what a clock says."""
    clocks = ("seconds", "tokens_per_second", "peak_memory")
    return [{k: v for k, v in row.items() if k not in clocks} for row in read(folder / "metrics.jsonl", "step")]


class Runs:
    """Runs that were never cut off, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self._root, self._made = root, dict[tuple[Layout, Precision], Path]()
        write_text(root)

    @property
    def text(self) -> Path:
        return self._root

    def get(self, layout: Layout, precision: Precision = Precision.fp64) -> Path:
        if (layout, precision) not in self._made:
            folder = self._made[layout, precision] = self._root / f"run-{len(self._made)}"
            folder.mkdir()
            run(self._root, layout, precision, folder)
        return self._made[layout, precision]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def go_on(runs: Runs, source: Layout, target: Layout, folder: Path) -> str:
    """In ``folder``, from the checkpoint that ``source`` has after ``CUT`` steps."""
    precision = choose_precision(source, target)
    given = runs.get(source, precision)
    shutil.copytree(given / "checkpoints" / f"{CUT:08}", folder / "checkpoints" / f"{CUT:08}")
    shutil.copy(given / "metrics.jsonl", folder)
    return run(runs.text, target, precision, folder)


def check(runs: Runs, source: Layout, target: Layout, folder: Path) -> None:
    assert f"goes on after step {CUT} and" in go_on(runs, source, target, folder)
    precision = choose_precision(source, target)
    whole, tolerance = runs.get(Layout(family=target.family), precision), 1e-9 if precision is Precision.fp64 else 1e-3
    found, alone, uncut = rows(folder), rows(whole), rows(runs.get(source, precision))
    assert [row["step"] for row in found] == list(range(STEPS)) and found[:CUT] == uncut[:CUT]
    if source == target:
        assert found == uncut
    for row, expected in zip(found, alone, strict=True):
        for name in ("loss", "grad_norm", "clip_factor", "aux"):
            assert row[name] == pytest.approx(expected[name], rel=tolerance), name
        assert row["mtp_losses"] == pytest.approx(expected["mtp_losses"], rel=tolerance)
        exact = ("lr", "tokens", "cursor", *(("violation_worst", "dead_experts") if tolerance == 1e-9 else ()))
        assert [row[name] for name in exact] == [expected[name] for name in exact]
    if tolerance == 1e-9:
        check_weights(folder, whole)
        check_average(folder, whole, target.family)
    kinds = [row["step"] for row in read(folder / "metrics.jsonl", "resume")]
    assert kinds == [CUT] and find(folder / "checkpoints") == [4, 6]


def check_weights(folder: Path, whole: Path) -> None:
    """Those that both runs have saved at their ends."""
    saved, wanted = (load_file(path / "weights" / "00001.safetensors") for path in (folder, whole))
    assert saved.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (saved[name] - tensor).abs().max() <= 1e-9 * tensor.abs().max().clamp(1e-9), name


def check_average(folder: Path, whole: Path, family: str) -> None:
    """That of the weights over all steps."""
    places = [path / "checkpoints" / f"{STEPS:08}" for path in (folder, whole)]
    model = make(folder, Layout(family=family), Precision.fp64).model
    found, wanted = (open_weights(place, read_manifest(place), model, average=True) for place in places)
    for name in wanted.shapes():
        expected = wanted.read(name)
        assert (found.read(name) - expected).abs().max() <= 1e-9 * expected.abs().max().clamp(1e-9), name


@pytest.mark.parametrize(("source", "target"), draw_pairs(LAYOUTS, 12, seed=5), ids=str)
def test_a_checkpoint_loads_into_another_layout(runs: Runs, tmp_path: Path, source: Layout, target: Layout) -> None:
    check(runs, source, target, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize(("source", "target"), draw_pairs(WIDE, 40, seed=6), ids=str)
def test_a_checkpoint_loads_into_any_layout(runs: Runs, tmp_path: Path, source: Layout, target: Layout) -> None:
    check(runs, source, target, tmp_path)


@pytest.mark.parametrize(("source", "target"), [(LAYOUTS[3], LAYOUTS[2]), (LAYOUTS[6], LAYOUTS[5])], ids=str)
def test_a_checkpoint_of_another_family_loads_too(runs: Runs, tmp_path: Path, source: Layout, target: Layout) -> None:
    check(runs, source._replace(family="grouped"), target._replace(family="grouped"), tmp_path)


@pytest.mark.parametrize("layout", [LAYOUTS[1], pytest.param(WIDE[-1], marks=pytest.mark.full)], ids=str)
def test_the_same_layout_goes_on_with_the_same_bits(runs: Runs, tmp_path: Path, layout: Layout) -> None:
    check(runs, layout, layout, tmp_path)


def test_every_value_is_written_once_and_evenly(runs: Runs) -> None:
    """Masters, moments, biases, places: as many values as the model has, a third of them on each of three ranks."""
    manifests = [read_manifest(runs.get(layout) / "checkpoints" / "00000004") for layout in (LAYOUTS[0], LAYOUTS[6])]
    sizes = [
        {name: tensor.shape for name, tensor in manifest.tensors.items() if not name.startswith(("rng/", "places/"))}
        for manifest in manifests
    ]
    assert sizes[0] == sizes[1]
    files = manifests[1].files()
    assert sorted(files) == [f"{rank:05}.safetensors" for rank in range(3)]
    assert max(files.values()) < 1.2 * min(files.values())
