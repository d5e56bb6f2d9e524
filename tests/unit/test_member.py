"""What ranks agree on before they train: two of them, each a thread, over a store in memory."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from small_models import make_config
from torch.distributed import HashStore

from configs.schema import RunConfig
from launcher.agreement import agree
from launcher.discover import Rank
from launcher.gate import UnprovedError
from parallel.topology import Topology
from training.config import CheckpointConfig, OptimizerConfig, RunSection
from training.data.config import DataConfig


def meet(make: Callable[[Topology], Path], here: tuple[int, int] = (2, 2), near_every: int = 0) -> list[Future[Path]]:
    """What each rank comes to; ``make`` is rank 0's. ``here``: ranks of the machine that each is on."""
    config = RunConfig(
        model=make_config(vocab_size=264),
        data=DataConfig(sequence_length=16),
        optimizer=OptimizerConfig(lr=1e-3),
        run=RunSection(name="small", steps=1, global_batch=2, micro_batch=1),
        checkpoint=CheckpointConfig(near_every=near_every),
    )
    store = HashStore()
    with ThreadPoolExecutor() as threads:
        return [
            threads.submit(agree, store, config, Rank(rank, 2, 0, here[rank]), make if rank == 0 else refuse)
            for rank in (0, 1)
        ]


def refuse(topology: Topology) -> Path:
    """No rank but the first makes the folder."""
    raise AssertionError


def test_rank_0_s_folder_is_everybody_s() -> None:
    assert [rank.result() for rank in meet(lambda topology: Path(f"dp{topology.dp}"))] == [Path("dp2")] * 2


@pytest.mark.parametrize("kind", [UnprovedError, ValueError])
def test_what_stops_rank_0_stops_every_rank(kind: type[Exception]) -> None:
    def stop(topology: Topology) -> Path:
        raise kind("FAILED  gradients")

    for rank in meet(stop):
        assert isinstance(rank.exception(), kind) and str(rank.exception()) == "FAILED  gradients"


def test_near_copies_want_as_many_ranks_on_every_machine() -> None:
    """Else a rank would wait for a neighbour that sends to another one."""
    for rank in meet(refuse, here=(2, 1), near_every=5):
        said = "checkpoint.near_every=5 must be 0 where machines have different numbers of ranks"
        assert str(rank.exception()).startswith(said)
        assert str(rank.exception()).endswith("that of rank 1 has 1, that of rank 0 2")
    assert [rank.result() for rank in meet(lambda topology: Path("run"), here=(2, 1))] == [Path("run")] * 2
    assert [rank.result() for rank in meet(lambda topology: Path("run"), near_every=5)] == [Path("run")] * 2
