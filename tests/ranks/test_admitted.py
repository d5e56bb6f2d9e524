"""Checkpoints to and from published weights: out of any layout, and into any.

An export of a run's last checkpoint is that of its weights, byte for byte. A run that begins with a checkpoint made of
published weights takes the steps of one that begins with ``init_from``.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from spawn import run_ranks
from test_checkpoints import LAYOUTS, WIDE, Layout, Runs, choose_precision, make, rows, train_rank

from configs.schema import TrainConfig
from model.config import ModelConfig
from model.huggingface import export
from parallel.config import EngineName
from parallel.topology import Topology
from training.checkpoint.first import admit
from training.checkpoint.folders import find, locate, read_manifest
from training.checkpoint.weights import open_weights
from training.config import Precision
from training.save import open_saved

SEVERAL = [
    LAYOUTS[3],
    *(pytest.param(layout, marks=pytest.mark.full) for layout in (Layout(Topology(pp=2, tp=2, ep=2)), *LAYOUTS[:7:6])),
]
BEGIN = [LAYOUTS[3], *(pytest.param(LAYOUTS[n], marks=pytest.mark.full) for n in (0, 2, 6))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def publish(run: Path, model: ModelConfig, folder: Path, fp8: bool = False) -> dict[str, bytes]:
    """The weights of a run, in ``folder``: its files."""
    export(open_saved(run / "weights"), model, folder, 20_000, 256, fp8)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("layout", SEVERAL, ids=str)
def test_a_checkpoint_is_published_as_the_weights_are(runs: Runs, tmp_path: Path, layout: Layout) -> None:
    run, model = runs.get(layout, Precision.bf16), make(runs.text, layout, Precision.bf16).model
    for fp8 in (False, True):
        wanted = publish(run, model, tmp_path / f"weights-{fp8}", fp8)
        for step in find(run / "checkpoints"):
            folder, place = tmp_path / f"{step}-{fp8}", locate(run / "checkpoints", step)
            export(open_weights(place, read_manifest(place), model), model, folder, 20_000, 256, fp8)
            found = {file.name: file.read_bytes() for file in folder.iterdir()}
            assert found.keys() == wanted.keys() and len(found) > 3
            assert (found == wanted) == (step == 6)


class Begun:
    """The first steps of runs from the same published weights, which those of ``runs`` are."""

    def __init__(self, runs: Runs, root: Path, precision: Precision) -> None:
        self._runs, self._root, self._precision = runs, root, precision
        self.published = root / "published"
        publish(runs.get(Layout(), precision), self.make(Layout()).model, self.published)

    def make(self, layout: Layout, init_from: Path | None = None) -> TrainConfig:
        config = make(self._runs.text, layout, self._precision)
        config.init_from, config.checkpoint.every = init_from and str(init_from), 0
        return replace(config, run=replace(config.run, steps=2, seed=7))

    def train(self, layout: Layout, admitted: bool) -> Path:
        folder = self._root / f"{layout}-{admitted}".replace(" ", "-")
        folder.mkdir()
        config = self.make(layout, None if admitted else self.published)
        if admitted:
            admit(self.make(Layout()), self.published, locate(folder / "checkpoints", 0))
        said = run_ranks(train_rank, layout.topology.world, layout.topology, config, str(folder))
        assert ("goes on after step 0 and 0 tokens" in said[0]) == admitted
        return folder


@pytest.fixture(scope="module")
def begun(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Begun, Path]:
    """What begins in float64, and the run of one process that began by ``init_from``."""
    made = Begun(runs, tmp_path_factory.mktemp("begun"), Precision.fp64)
    return made, made.train(Layout(), admitted=False)


def check(found: Path, wanted: Path, tolerance: float) -> None:
    assert len(rows(found)) == len(rows(wanted)) == 2
    for row, expected in zip(rows(found), rows(wanted), strict=True):
        for name in ("loss", "grad_norm", "mtp_losses"):
            assert row[name] == pytest.approx(expected[name], rel=tolerance), name


@pytest.mark.parametrize("layout", BEGIN, ids=str)
def test_any_layout_begins_with_published_weights(begun: tuple[Begun, Path], layout: Layout) -> None:
    made, alone = begun
    found = made.train(layout, admitted=True)
    check(found, alone, 1e-9)
    if layout == Layout():
        assert rows(found) == rows(alone)
        assert (found / "weights" / "00001.safetensors").read_bytes() == (
            alone / "weights" / "00001.safetensors"
        ).read_bytes()


@pytest.mark.parametrize("layout", [LAYOUTS[3], pytest.param(LAYOUTS[2], marks=pytest.mark.full)], ids=str)
def test_both_ways_to_begin_are_the_same(begun: tuple[Begun, Path], layout: Layout) -> None:
    """``init_from`` in several ranks against itself in one."""
    made, alone = begun
    check(made.train(layout, admitted=False), alone, 1e-9)


@pytest.mark.full
@pytest.mark.parametrize("engine", [EngineName.zero1, EngineName.zero3], ids=str)
def test_deepspeeds_engines_begin_without_moments(runs: Runs, tmp_path: Path, engine: EngineName) -> None:
    layout = next(layout for layout in WIDE if layout.engine is engine)
    made = Begun(runs, tmp_path, choose_precision(layout))
    check(made.train(layout, admitted=True), made.train(Layout(), admitted=False), 1e-3)


def test_what_is_imported_is_what_was_published(runs: Runs, tmp_path: Path) -> None:
    """In a wider precision than the model's: nothing is rounded away, and there are no moments."""
    run, config = runs.get(Layout(), Precision.fp64), make(runs.text, Layout(), Precision.fp32)
    publish(run, config.model, tmp_path / "published")
    place = locate(tmp_path, 0)
    size = admit(config, tmp_path / "published", place)
    manifest = read_manifest(place)
    assert size == manifest.count_bytes() and {name.partition("/")[0] for name in manifest.tensors} == {
        "master",
        "buffer",
    }
    assert {stored.dtype for stored in manifest.tensors.values()} == {"float32"}
    found, saved = open_weights(place, manifest, config.model), open_saved(run / "weights")
    for name in saved.shapes():
        assert torch.equal(found.read(name), saved.read(name).float()), name
