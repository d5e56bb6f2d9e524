"""Near copies by name: which there are, which are chosen, which go."""

import random
from pathlib import Path

import pytest
from small_runs import make_run

from parallel.topology import Topology
from training.checkpoint import near
from training.checkpoint.files import name_file
from training.checkpoint.near import Choice, Has, choose, find, locate, name_manifest
from training.checkpoint.nearest import clear
from training.config import CheckpointConfig


def test_the_newest_step_that_everybody_has_is_chosen() -> None:
    have = [Has(0, 7, 0), Has(1, 7, 0), Has(1, 7, 1), Has(0, 8, 0), Has(0, 6, 1), Has(0, 6, 0)]
    assert choose(have, 2) == Choice(7, [0, 1])
    assert choose([has for has in have if has.step != 7], 2) == Choice(6, [0, 0])
    assert choose([], 1) is None and choose([Has(0, 7, 0)], 2) is None


@pytest.mark.parametrize("seed", range(50))
def test_of_any_state_of_affairs(seed: int) -> None:
    """Against the definition, with the order in which things are said not mattering."""
    draw = random.Random(seed)  # noqa: S311
    world = draw.randint(1, 5)
    everything = [Has(h, s, o) for h in range(world) for s in range(1, 5) for o in range(world + 1)]
    have = draw.sample(everything, draw.randint(0, len(everything)))
    found = choose(have, world)
    whole = [s for s in range(1, 5) if all(any(x[1:] == (s, o) for x in have) for o in range(world))]
    assert (found.step if found else 0) == max(whole, default=0)
    assert found == choose(draw.sample(have, len(have)), world)
    if found:
        can = [[has.holder for has in have if has[1:] == (found.step, owner)] for owner in range(world)]
        assert found.holders == [owner if owner in where else min(where) for owner, where in enumerate(can)]


def put(root: Path, step: int, owner: int) -> None:
    locate(root, step).mkdir(parents=True, exist_ok=True)
    (locate(root, step) / name_file(owner)).touch()
    (locate(root, step) / name_manifest(owner)).touch()


def test_a_copy_is_there_once_its_manifest_is(tmp_path: Path) -> None:
    for step, owner in ((6, 1), (7, 0), (7, 12)):
        put(tmp_path, step, owner)
    (locate(tmp_path, 7) / name_file(3)).touch()
    (locate(tmp_path, 7) / name_manifest(4)).touch()
    (locate(tmp_path, 7) / "notes.json").touch()
    assert find(tmp_path) == [(7, 12), (7, 0), (6, 1)] and find(tmp_path / "none") == []


def test_runs_and_layouts_have_folders_of_their_own(tmp_path: Path) -> None:
    config, other = make_run(tmp_path), make_run(tmp_path, steps=9)
    assert near.name_run(config, tmp_path / "a" / "x") != near.name_run(config, tmp_path / "b" / "x")
    assert near.name_run(config, tmp_path / "x").name.startswith("shoestring-x-")
    assert near.name_layout(config, Topology(dp=2)) == near.name_layout(other, Topology(dp=2))  # of as many steps
    assert near.name_layout(config, Topology(dp=2)) != near.name_layout(config, Topology(tp=2))


def test_all_go_but_those_that_a_run_goes_on_from(tmp_path: Path) -> None:
    for layout in "ab":
        for step in (6, 7, 8):
            put(tmp_path / layout, step, 0)
    clear(tmp_path, locate(tmp_path / "a", 7))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")) == ["a/00000007/00000.json"]
    clear(tmp_path, locate(tmp_path / "c", 7))
    assert not list(tmp_path.iterdir())
    clear(tmp_path / "none", tmp_path / "none" / "a")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"near_every": -1}, "checkpoint.near_every=-1 must not be negative"),
        ({"near_folder": "near"}, "checkpoint.near_folder=near must be an absolute path"),
    ],
)
def test_mistakes(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CheckpointConfig(**changes)  # type: ignore[arg-type]
