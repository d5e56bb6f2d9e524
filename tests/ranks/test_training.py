"""A whole run on several ranks is the run of one process: losses, norms, counts, evaluation and saved weights."""

import json
import math
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import make_config
from small_runs import make_run, open_run
from spawn import run_ranks
from torch import Tensor

from configs.schema import TrainConfig
from model.huggingface import export
from model.shards import Shards
from parallel.config import ParallelConfig, PipelineConfig, ScheduleName
from parallel.mesh import Mesh
from parallel.pipeline.schedules import generate
from parallel.pipeline.simulate import simulate
from parallel.pipeline.stages import whole as undivided
from parallel.pipeline.text import parse
from parallel.topology import Topology
from training import whole
from training.config import Precision, RampConfig
from training.evaluate import evaluate
from training.finish import Ending, Summary
from training.interrupt import Interrupt
from training.loop import train_on
from training.metrics import read
from training.save import load, open_saved
from training.setup import set_up
from training.step import run_step
from training.weights import build_parts

ALONE = Topology()


@pytest.fixture(scope="module")
def reference(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process."""
    return run(text, tmp_path_factory.mktemp("alone"), ALONE, 4)[0]


def make(text: Path, micro_batch: int, **changes: Any) -> TrainConfig:
    """Four steps of 8 sequences, the first two of 4, measured twice on 21 sequences."""
    return make_run(
        text,
        model=make_config(vocab_size=264, num_layers=4, mtp=1),
        precision=Precision.fp64,
        micro_batch=micro_batch,
        **{"steps": 4, "ramp": RampConfig(start=4, tokens=100), "eval_every": 2, "eval_tokens": 21 * 16, **changes},
    )


def run(
    text: Path, folder: Path, topology: Topology, micro_batch: int, schedule: str = "1f1b"
) -> tuple[Path, list[Any]]:
    config = make(text, micro_batch)
    config.parallel = ParallelConfig(pp=topology.pp, pipeline=PipelineConfig(schedule=ScheduleName[schedule]))
    return folder, run_ranks(train_rank, topology.world, topology, config, str(folder))


def train_rank(rank: int, world: int, topology: Topology, config: TrainConfig, folder: str) -> tuple[Summary, str]:
    """A run on one rank: its summary, and what it printed."""
    with redirect_stdout(StringIO()) as shown:
        summary = train_on(Mesh(topology, torch.device("cpu")), config, Path(folder))
    return summary, shown.getvalue()


@pytest.mark.parametrize(
    ("topology", "micro_batch", "schedule"),
    [
        (Topology(dp=2), 2, "1f1b"),
        pytest.param(Topology(dp=4, ep=2), 1, "1f1b", marks=pytest.mark.full),
        (Topology(dp=2, tp=2, ep=2), 2, "1f1b"),
        (Topology(pp=2, dp=2, ep=2), 1, "1f1b"),
        pytest.param(Topology(pp=2), 1, "zb_v", marks=pytest.mark.full),
        pytest.param(Topology(pp=2, tp=2), 1, "dualpipev", marks=pytest.mark.full),
        (Topology(pp=2), 1, "dualpipe"),
    ],
    ids=str,
)
def test_equals_one_process(
    text: Path, reference: Path, tmp_path: Path, topology: Topology, micro_batch: int, schedule: str
) -> None:
    folder, ranks = run(text, tmp_path, topology, micro_batch, schedule)
    check_steps(folder, reference, topology)
    evaluations, expected = (
        [row["loss"] for row in read(path / "metrics.jsonl", "eval")] for path in (folder, reference)
    )
    assert len(evaluations) == 2 and evaluations == pytest.approx(expected, rel=1e-11)
    saved, wanted = (load_file(path / "weights" / "00001.safetensors") for path in (folder, reference))
    assert saved.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (saved[name] - tensor).abs().max() <= 1e-9 * tensor.abs().max().clamp(1e-9), name
    check_plain(text, folder, evaluations[-1])
    check_endings(folder, reference, ranks)
    check_schedule(folder, topology, schedule)


def check_plain(text: Path, folder: Path, held_out: float) -> None:
    """The saved weights in a plain model, asked the same by itself."""
    setup = open_run(make(text, 4))
    load(next(iter(setup.stages.values())), folder / "weights")
    assert evaluate(setup) == pytest.approx(held_out, rel=1e-11)


def check_schedule(folder: Path, topology: Topology, schedule: str) -> None:
    """What the record and the folder say of the schedule."""
    start = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    stages = {"1f1b": topology.pp, "dualpipe": topology.pp}.get(schedule, 2 * topology.pp)
    assert (start["schedule"], start["stages"]) == (schedule, stages)
    drawn = [(folder / name).exists() for name in ("schedule.svg", "schedule.txt")]
    assert drawn == [topology.pp > 1] * 2
    if topology.pp > 1:
        written = parse((folder / "schedule.txt").read_text(), schedule)
        assert written == generate(schedule, topology.pp, start["micro_batches"])
        # Stages differ, which makes more of a bubble, except where every rank has a copy of every stage.
        plain = max(simulate(written).bubbles) / simulate(written).makespan
        assert start["bubble"] == pytest.approx(plain) if schedule == "dualpipe" else plain < start["bubble"] < 1
        assert f"{written.stages} stages" in (folder / "schedule.svg").read_text()
    else:
        assert start["bubble"] == 0


def check_steps(folder: Path, reference: Path, topology: Topology) -> None:
    """Every step's row, and the loads of every expert."""
    loads, wanted = (read(path / "metrics.jsonl", "load") for path in (folder, reference))
    assert loads == wanted and [row["step"] for row in loads] == [0, 1, 2, 3]
    ours, theirs = (read(path / "metrics.jsonl", "step") for path in (folder, reference))
    assert len(ours) == len(theirs) == 4 and [row["tokens"] // 16 for row in ours] == [4, 4, 8, 8]
    for row, expected in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "clip_factor", "aux"):
            assert row[name] == pytest.approx(expected[name], rel=1e-11), name
        assert row["mtp_losses"] == pytest.approx(expected["mtp_losses"], rel=1e-11)
        for name in ("lr", "tokens", "cursor", "violation_worst", "violation_mean", "dead_experts", "skipped"):
            assert row[name] == expected[name], name
        # All ranks are on one machine; a token goes to every other rank of its ep group at most, in each of 4 layers.
        most = 4 * row["tokens"] * (topology.ep - 1) * 12 * 8
        assert row["nodes_touched"] == (topology.ep > 1) and row["bytes_across"] == 0
        assert (0 < row["bytes_inside"] <= most) if topology.ep > 1 else row["bytes_inside"] == 0


def check_endings(folder: Path, reference: Path, ranks: list[tuple[Summary, str]]) -> None:
    """Rank 0 alone writes; all show the same losses, whichever stages they have."""
    (first, shown), *others = ranks
    rows = read(folder / "metrics.jsonl", "step")
    assert "held-out loss" in shown and "ranks of 1 threads" in shown
    for text in (shown, *(text for _, text in others)):
        said = re.findall(r"^step (\S+)  loss (\S+)", text, re.MULTILINE)
        assert said[-1] == ("4/4", f"{first.loss:.3f}") and said[0][1] == f"{rows[0]['loss']:.3f}"
    assert not any("ranks of" in text for _, text in others)
    assert all(
        (s.ending, s.steps, s.loss, s.held_out) == (Ending.finished, 4, first.loss, first.held_out) for s, _ in ranks
    )
    (end,), (expected,) = (read(path / "metrics.jsonl", "end") for path in (folder, reference))
    assert end["bigram"] == expected["bigram"] and not math.isnan(end["bigram"])
    assert (folder / "sample.txt").read_text() == (reference / "sample.txt").read_text()
    starts = [json.loads((path / "metrics.jsonl").read_text().splitlines()[0]) for path in (folder, reference)]
    assert starts[0]["parameters"] == starts[1]["parameters"] and starts[0]["ranks"] == len(ranks)


def test_without_saved_weights_a_spread_model_has_no_sample(text: Path, tmp_path: Path) -> None:
    config = make(text, 2, steps=1, ramp=RampConfig(), eval_every=0)
    config.checkpoint.save = False
    topology = Topology(dp=2, ep=2)
    (_, shown), _ = run_ranks(train_rank, 2, topology, config, str(tmp_path))
    assert "no sample" in shown and {path.name for path in tmp_path.iterdir()} == {
        "ledger.jsonl",
        "logs",
        "metrics.jsonl",
    }


def fail_to_fit(rank: int, world: int, config: TrainConfig, folder: str) -> str:
    whole.measure_free_memory = lambda device: 10**4
    return train_rank(rank, world, Topology(dp=2, ep=2), config, folder)[1]


def test_a_model_too_large_for_a_rank_has_no_sample(text: Path, tmp_path: Path) -> None:
    shown, _ = run_ranks(fail_to_fit, 2, make(text, 2, steps=1, ramp=RampConfig(), eval_every=0), str(tmp_path))
    assert "no sample: the whole model takes 0.0 GB" in shown
    assert (tmp_path / "weights").exists() and not (tmp_path / "sample.txt").exists()


def read_weights(rank: int, world: int, topology: Topology, config: TrainConfig) -> dict[str, tuple[Any, Tensor]]:
    """What a rank holds of the published weights that it starts from; it reads no experts of others."""
    read: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "read", lambda *words, inner=Shards.read: read.append(words[1]) or inner(*words))
        stages, shards = build_parts(config, Mesh(topology, torch.device("cpu")), undivided(config.model))
    experts = [name for name in read if ".experts." in name]
    here = sum(shard.shape[0] for name, shard in shards.items() if name.endswith("experts.routed.down.weight"))
    assert len(experts) == len(set(experts)) == 3 * here > 0
    return {name: (shards[name].slices, parameter.detach()) for name, parameter in stages[0].named_parameters()}


def test_starts_from_published_weights(text: Path, reference: Path, tmp_path: Path) -> None:
    config = make(text, 2)
    export(open_saved(reference / "weights"), config.model, tmp_path / "published", 10**9, 256)
    config.init_from = str(tmp_path / "published")
    wanted = load_file(reference / "weights" / "00001.safetensors")
    for part in run_ranks(read_weights, 4, Topology(dp=2, tp=2, ep=4), config):
        names = [name for name in part if not name.startswith("mtp")]
        assert len(names) > 20
        for name in names:
            slices, tensor = part[name]
            assert torch.equal(tensor.float(), wanted[name][slices].float()), name


def stop_rank(rank: int, world: int, config: TrainConfig, folder: str) -> Ending:
    """Ctrl-C reaches rank 1 only, in the middle of its second step."""
    reads = 0
    entered = Interrupt.__enter__

    def enter(interrupt: Interrupt) -> Interrupt:
        from training import steps

        def counted(*arguments: Any) -> Any:
            nonlocal reads
            reads += 1
            interrupt.asked = interrupt.asked or (rank == 1 and reads == 2)
            return run_step(*arguments)

        steps.run_step = counted
        return entered(interrupt)

    Interrupt.__enter__ = enter  # type: ignore[method-assign]
    return train_rank(rank, world, Topology(dp=2), config, folder)[0].ending


def test_ranks_stop_together(text: Path, tmp_path: Path) -> None:
    endings = run_ranks(stop_rank, 2, make(text, 2), str(tmp_path))
    assert endings == [Ending.interrupted] * 2
    assert len(read(tmp_path / "metrics.jsonl", "step")) == 2 and (tmp_path / "weights").exists()


def poison_rank(rank: int, world: int, config: TrainConfig) -> list[Any]:
    """Rank 1 alone has a weight that is not finite, in the first of two steps."""
    setup = set_up(config, lambda line: None, Mesh(Topology(dp=2), torch.device("cpu")))
    weight = setup.stages[0].norm.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0] = float("nan") if rank == 1 else weight[0]
    first = run_step(setup, 0, lambda: False)
    with torch.no_grad():
        weight.copy_(kept)
    second = run_step(setup, 1, lambda: False)
    assert first is not None and second is not None
    biases = [bool(router.bias.any()) for router in setup.stages[0].routers()]
    return [first.skipped, second.skipped, second.loss, all(biases)]


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(text: Path) -> None:
    first, second = run_ranks(poison_rank, 2, make(text, 2))
    assert first == second and first[:2] == [True, False] and math.isfinite(first[2]) and first[3]
