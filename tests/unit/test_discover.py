"""Which rank a process is, by its environment; how many ranks a configuration asks for; equal configurations."""

from dataclasses import replace

import pytest
from small_models import make_config

from configs.schema import RunConfig
from launcher.ranks import Rank, arrange_ranks, describe, differ, discover, identify, share_threads
from parallel.config import ParallelConfig
from training.config import DataConfig, OptimizerConfig, RunSection

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_a_process_that_nobody_started_as_a_rank_is_none() -> None:
    assert discover({}) is None
    assert discover({"LOCAL_RANK": "1", "MASTER_ADDR": "here", "OMP_NUM_THREADS": "1"}) is None


def test_torchrun_says_who_a_process_is() -> None:
    assert discover(TORCHRUN) == Rank(rank=5, world=8, local=1, here=4)


def test_on_a_single_machine_the_local_rank_is_the_rank() -> None:
    short = {name: value for name, value in TORCHRUN.items() if not name.startswith("LOCAL")}
    assert discover(short) == Rank(rank=5, world=8, local=5, here=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None}, "RANK is missing"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is missing"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is missing"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is missing"),
        ({"RANK": "8"}, "RANK=8 in the environment must be below WORLD_SIZE=8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 in the environment must be below LOCAL_WORLD_SIZE=4"),
        ({"RANK": "one"}, "RANK=one in the environment must be a number"),
        ({"RANK": "-1"}, "RANK=-1 in the environment must be a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment must be a number"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(changes: dict[str, str | None], message: str) -> None:
    environment = {name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        discover(environment)


def ask(**degrees: int | None) -> ParallelConfig:
    """A parallel section with these degrees, whatever the section itself refuses so far."""
    section = ParallelConfig()
    for axis, degree in degrees.items():
        setattr(section, axis, degree)
    return section


def test_a_configuration_asks_for_ranks() -> None:
    assert arrange_ranks(ask(), None).world == 1
    assert arrange_ranks(ask(dp=4, ep=4), None).world == 4
    assert arrange_ranks(ask(tp=2, dp=2, pp=2), None).world == 8
    assert arrange_ranks(ask(tp=2), None).dp == 1


def test_dp_takes_what_the_world_leaves() -> None:
    assert arrange_ranks(ask(tp=2, ep=4), 8).dp == 4
    with pytest.raises(ValueError, match="must equal the number of ranks, 4"):
        arrange_ranks(ask(dp=3), 4)
    with pytest.raises(ValueError, match=r"parallel\.ep=4 must divide"):
        arrange_ranks(ask(ep=4), None)


def test_cores_are_shared_by_the_ranks_of_a_machine() -> None:
    assert [share_threads(None, 8, here) for here in (1, 2, 3, 8, 16)] == [8, 4, 2, 1, 1]
    assert share_threads(3, 8, 4) == 3


def test_configurations_are_told_apart_by_their_first_differing_key() -> None:
    config = RunConfig(
        model=make_config(vocab_size=264),
        data=DataConfig(sequence_length=8),
        optimizer=OptimizerConfig(lr=1e-3),
        run=RunSection(steps=1, global_batch=1, micro_batch=1, name="one"),
    )
    other = replace(config, optimizer=OptimizerConfig(lr=2e-3))
    assert identify(config) == identify(replace(config)) != identify(other)
    assert differ(describe(other), describe(config)) == ("optimizer.lr", 2e-3, 1e-3)
