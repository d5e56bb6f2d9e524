"""Which rank a process is, by its environment; how many ranks a configuration asks for; equal configurations.

recorded/ has what launchers told their processes, each on real machines: tests/cluster/record.py.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_models import make_config

from configs.schema import RunConfig
from launcher.discover import PORTS, Backend, Rank, choose_port, count_tasks, discover, name_first
from launcher.ranks import arrange_ranks, describe, differ, identify
from parallel.config import ParallelConfig
from training.config import OptimizerConfig, RunSection
from training.data.config import DataConfig

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
    assert discover(TORCHRUN) == Rank(5, 8, 1, 4, node=1, address="127.0.0.1:29500")


def test_on_a_single_machine_the_local_rank_is_the_rank() -> None:
    short = {name: value for name, value in TORCHRUN.items() if not name.startswith("LOCAL")}
    assert discover(short) == Rank(5, 8, 5, 8, node=0, address="127.0.0.1:29500")


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


RECORDED = Path(__file__).parent / "recorded"
ALONE = ("batch", "salloc", "srun_one_task", "srun_in_array")  # nobody has started several


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_launchers_say_who_a_process_is(path: Path) -> None:
    processes = json.loads(path.read_text())["processes"]
    environments = [process["environment"] for process in processes]
    if path.stem in ALONE:
        assert [discover(environment) for environment in environments] == [None] * len(environments)
        return
    if path.stem == "srun_cyclic":
        with pytest.raises(ValueError, match=r"rank 1 must be rank 3, as number 0 .*=block"):
            [discover(environment) for environment in environments]
        return
    ranks = [rank for environment in environments if (rank := discover(environment)) is not None]
    hosts = [process["host"] for process in processes]
    machines = list(dict.fromkeys(hosts))
    assert [rank.rank for rank in ranks] == list(range(len(hosts)))
    assert {rank.world for rank in ranks} == {len(hosts)}
    assert [rank.local for rank in ranks] == [hosts[:number].count(host) for number, host in enumerate(hosts)]
    assert [rank.here for rank in ranks] == [hosts.count(host) for host in hosts]
    mpi = path.stem.startswith("mpirun")
    assert {rank.backend for rank in ranks} == {
        Backend(path.stem.partition("_")[0].replace("mpirun", "mpi").replace("srun", "slurm"))
    }
    assert [rank.node for rank in ranks] == ([None] * len(hosts) if mpi else list(map(machines.index, hosts)))
    (address,) = {rank.address for rank in ranks}
    assert address is None if mpi else address is not None and address.partition(":")[0] == machines[0]


def test_where_ranks_meet_counts_under_every_launcher() -> None:
    """The supervisor of a job has a store of its own."""
    (process, *_) = json.loads((RECORDED / "srun.json").read_text())["processes"]
    environment = process["environment"] | {"MASTER_ADDR": "10.77.0.9", "MASTER_PORT": "4711"}
    rank = discover(environment)
    assert rank is not None and (rank.address, rank.backend) == ("10.77.0.9:4711", Backend.slurm)
    again = discover(rank.variables())
    assert again is not None and again[:6] == rank[:6], "torch, DeepSpeed and ranks of our own read the same"


def test_every_attempt_meets_elsewhere() -> None:
    step = {"SLURM_JOB_ID": "123", "SLURM_STEP_ID": "0"}
    ports = {choose_port(step | {"SLURM_RESTART_COUNT": str(number)}) for number in range(20)}
    assert len(ports) > 15 and all(port in PORTS for port in ports)
    assert choose_port(step) == choose_port(step | {"SLURM_RESTART_COUNT": "0"})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("n1", "n1"),
        ("n[003-007,9],m1", "n003"),
        ("m1,n[3-7]", "m1"),
        ("r[1-2]n[3,5]", "r1n3"),
        ("gpu-a[7]-x", "gpu-a7-x"),
    ],
)
def test_the_first_of_a_list_of_hosts(hosts: str, first: str) -> None:
    assert name_first(hosts) == first


def test_tasks_of_nodes() -> None:
    assert count_tasks("2(x3),1") == [2, 2, 2, 1] and count_tasks("4") == [4]
    with pytest.raises(ValueError, match="SLURM_STEP_TASKS_PER_NODE=2x3 in the environment cannot be read"):
        count_tasks("2x3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_PROCID": None}, "SLURM_PROCID is missing"),
        ({"SLURM_LOCALID": "x"}, "SLURM_LOCALID=x in the environment must be a number"),
        ({"SLURM_NODEID": "7"}, "SLURM_NODEID=7 in the environment must be below 2"),
        ({"SLURM_STEP_NODELIST": None}, "SLURM_STEP_NODELIST is missing"),
        ({"SLURM_LOCALID": "5", "SLURM_PROCID": "5"}, "SLURM_PROCID=5 in the environment must be below"),
    ],
)
def test_a_step_that_contradicts_itself_is_refused(changes: dict[str, str | None], message: str) -> None:
    (process, *_) = json.loads((RECORDED / "srun.json").read_text())["processes"]
    environment = {name: value for name, value in {**process["environment"], **changes}.items() if value is not None}
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
