"""Near copies on four ranks of two nodes: what they go on from when a node is lost, or a byte, or the layout changes.

Each rank is given a folder by its node, so that a node's memory can be taken away.
"""

import os
import shutil
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import make_config
from small_runs import make_run, write_text
from spawn import run_ranks

from configs.schema import TrainConfig
from parallel.config import EngineName, ParallelConfig
from parallel.mesh import Mesh
from parallel.topology import Topology
from training.checkpoint.folders import find, make_own
from training.checkpoint.manifest import DamagedError
from training.checkpoint.near import locate, read_manifest
from training.checkpoint.post import receive, send
from training.loop import train_on
from training.metrics import read

WORLD, EACH, STEPS = 4, 2, 10
EXPERTS = {"experts": 8, "groups": 4, "top_groups": 2}
CUT = 8  # the step in which a run is cut off


class CutOffError(Exception):
    """What a run is cut off by."""


def make(text: Path, near: Path, every: int, engine: EngineName, ep: int) -> TrainConfig:
    config = make_run(
        text, model=make_config(vocab_size=264, mtp=1, moe=EXPERTS), steps=STEPS, eval_every=3, micro_batch=2
    )
    config.parallel = ParallelConfig(dp=WORLD, ep=ep, engine=engine, rebalance_every=2 if ep > 1 else 0)
    config.run.sample.tokens = 0
    config.checkpoint.every, config.checkpoint.minutes, config.checkpoint.keep = 5, None, 9
    config.checkpoint.near_every, config.checkpoint.near_folder = every, str(near)
    return config


def take(
    rank: int, world: int, text: Path, folder: Path, cut: bool, every: int = 1, engine: str = "native", ep: int = 4
) -> str:
    """A run, or its first steps: what it said, on this rank."""
    from training import steps

    def stop(setup: Any, step: int, *args: Any) -> Any:
        if step == CUT:
            wait_for_copies(folder)
            raise CutOffError
        return taken(setup, step, *args)

    taken, said = steps.run_step, StringIO()
    steps.run_step = stop if cut else taken  # type: ignore[assignment]
    mesh = Mesh(Topology(dp=WORLD, ep=ep), torch.device("cpu"))
    mesh.ranks_per_node = EACH
    config = make(text, folder / f"node{rank // EACH}", every, EngineName(engine), ep)
    try:
        with redirect_stdout(said):
            train_on(mesh, config, folder)
    except CutOffError:
        pass
    finally:
        steps.run_step = taken
    return said.getvalue()


def wait_for_copies(folder: Path) -> None:
    """Those of the last step are not made before the next one has begun: until they are there."""
    deadline = time.monotonic() + 20
    while len(list(folder.glob(f"node*/*/*/{CUT:08}/*.json"))) < 2 * WORLD:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def rows(folder: Path) -> list[dict[str, Any]]:
    clocks = ("seconds", "tokens_per_second", "peak_memory")
    found = [*read(folder / "metrics.jsonl", "step"), *read(folder / "metrics.jsonl", "eval")]
    return [{k: v for k, v in row.items() if k not in clocks} for row in found]


def resumed(folder: Path) -> list[int]:
    return [row["step"] for row in read(folder / "metrics.jsonl", "resume")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never cut off, and made no near copies."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(take, WORLD, text, folder, False, 0)
    assert not list(folder.glob("node*")) and not read(folder / "metrics.jsonl", "near_copy")
    return folder


@pytest.fixture
def cut(text: Path, tmp_path: Path) -> Path:
    """A run with near copies that was cut off in its ninth step."""
    run_ranks(take, WORLD, text, tmp_path, True)
    assert find(tmp_path / "checkpoints") == [5]
    return tmp_path


def steps_of(folder: Path, node: int) -> list[str]:
    """The steps that a node has copies of."""
    return sorted(path.name for path in folder.glob(f"node{node}/*/*/*"))


def test_a_run_goes_on_from_them(text: Path, whole: Path, cut: Path) -> None:
    for node in range(2):
        assert steps_of(cut, node)[-1] == "00000008" and len(steps_of(cut, node)) <= 3
        kept = next(cut.glob(f"node{node}/*/*/00000007"))
        assert sorted(path.name for path in kept.glob("*.json")) == [f"{rank:05}.json" for rank in range(WORLD)]
    said = run_ranks(take, WORLD, text, cut, False)[0]
    assert resumed(cut) == [CUT] and "near copies after step 8 are taken" in said and "another node" not in said
    assert rows(cut) == rows(whole)
    assert not list(cut.glob("node*/*"))  # finished


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.full)])
def test_a_lost_node_is_served_by_the_other(text: Path, whole: Path, cut: Path, lost: int) -> None:
    shutil.rmtree(cut / f"node{lost}")
    said = run_ranks(take, WORLD, text, cut, False)[0]
    assert (
        resumed(cut) == [CUT]
        and "near copies after step 8 are taken, 2 from another node\ngoes on after step 8 and 1,024 tokens" in said
    )
    assert rows(cut) == rows(whole)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("both", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_flipped_byte_is_seen(text: Path, whole: Path, cut: Path, both: bool) -> None:
    """A rank reads its own node's copy; where that is damaged, the other node's; then that of the step before."""
    for path in cut.glob(f"node{'*' if both else 1}/*/*/00000008/00003.safetensors"):
        flip(path)
    said = run_ranks(take, WORLD, text, cut, False)[0]
    assert said.count("a near copy after step 8 cannot be loaded: rank 3: ") == 1 + both and "is damaged" in said
    assert ("near copies after step 8 are taken, 4 from another node" in said) is not both
    assert resumed(cut) == [7 if both else 8] and rows(cut) == rows(whole)


def test_nobody_else_s_folder_is_used(text: Path, whole: Path, cut: Path) -> None:
    """Its name can be guessed: a link to where copies are is no folder of this user's, and stays as it is."""
    for run in cut.glob("node*/*"):
        run.rename(run.with_name("theirs"))
        run.symlink_to("theirs")
    said = run_ranks(take, WORLD, text, cut, False)[0]
    assert "no near copy after step 6: rank 0: " in said and "is not this user's own folder" in said
    assert resumed(cut) == [5] and rows(cut) == rows(whole)
    assert all(len(list(path.iterdir())) for path in cut.glob("node*/theirs/*"))


def post(rank: int, world: int, folder: Path) -> str:
    """Rank 0 sends a copy that cannot be read to its end."""
    place, group = locate(folder / f"node{rank}" / "run" / "layout", 3), dist.group.WORLD
    assert group is not None
    try:
        if rank == 0:
            make_own(folder / "node0" / "run")
            place.mkdir(parents=True)
            (place / "00000.safetensors").symlink_to(
                "/sys/kernel/mm/transparent_hugepage/enabled"
            )  # less than its size
            (place / "00000.json").write_text("{}")
            send(place, 0, 1, group)
        else:
            receive(place, 0, 0, group)
            read_manifest(place, 0)
    except (OSError, DamagedError) as error:
        return str(error)
    return ""


def test_a_read_error_lets_nobody_wait(tmp_path: Path) -> None:
    sent, received = run_ranks(post, 2, tmp_path)
    assert "bytes early" in sent and "00000.json" in received


@pytest.mark.full
def test_where_all_are_damaged_the_checkpoint_is_taken(text: Path, whole: Path, cut: Path) -> None:
    for path in cut.glob("node*/*/*/*/00001.safetensors"):
        os.truncate(path, 2000)
    said = run_ranks(take, WORLD, text, cut, False)[0]
    assert said.count("cannot be loaded: rank 1: ") >= 2 and "goes on after step 5" in said
    assert resumed(cut) == [5] and rows(cut) == rows(whole)


@pytest.mark.full
def test_nothing_of_both_nodes_is_left(text: Path, whole: Path, cut: Path) -> None:
    for path in cut.glob("node*"):
        shutil.rmtree(path)
    run_ranks(take, WORLD, text, cut, False)
    assert resumed(cut) == [5] and rows(cut) == rows(whole)


@pytest.mark.full
def test_another_layout_takes_the_checkpoint(text: Path, cut: Path) -> None:
    run_ranks(take, WORLD, text, cut, False, 1, "native", 2)
    assert resumed(cut) == [5]


@pytest.mark.full
def test_a_record_that_is_behind_takes_the_step_before(text: Path, whole: Path, cut: Path) -> None:
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"kind": "step", "step": 7' not in line]
    assert len(kept) == len(lines) - 1
    (cut / "metrics.jsonl").write_text("".join(kept))
    run_ranks(take, WORLD, text, cut, False)
    assert resumed(cut) == [7] and rows(cut) == rows(whole)


@pytest.mark.full
def test_where_nothing_can_be_written_the_run_goes_on(text: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "node1").write_text("no folder")
    said = run_ranks(take, WORLD, text, tmp_path, False)[0]
    assert "no near copy after step 1: rank 2: " in said and "rank 3: " in said
    assert rows(tmp_path) == rows(whole) and not resumed(tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("engine", ["fsdp2", "zero1"])
def test_other_engines(text: Path, tmp_path: Path, engine: str) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    run_ranks(take, WORLD, text, whole, False, 0, engine, 1)
    run_ranks(take, WORLD, text, tmp_path, True, 1, engine, 1)
    run_ranks(take, WORLD, text, tmp_path, False, 1, engine, 1)
    assert resumed(tmp_path) == [CUT] and rows(tmp_path) == rows(whole)
