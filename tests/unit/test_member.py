"""What ranks agree on before they train: two of them, each a thread, over a store in memory."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from small_models import make_config
from torch.distributed import HashStore

from configs.schema import RunConfig
from launcher import ranks
from launcher.gate import UnprovedError
from launcher.member import agree
from parallel.topology import Topology
from training.config import DataConfig, OptimizerConfig, RunSection


def meet(make: Callable[[Topology], Path]) -> list[Future[Path]]:
    """What each rank comes to; ``make`` is rank 0's."""
    config = RunConfig(
        model=make_config(vocab_size=264),
        data=DataConfig(sequence_length=16),
        optimizer=OptimizerConfig(lr=1e-3),
        run=RunSection(name="small", steps=1, global_batch=2, micro_batch=1),
    )
    store = HashStore()
    with ThreadPoolExecutor() as threads:
        return [
            threads.submit(agree, store, config, ranks.Rank(rank, 2, rank, 2), make if rank == 0 else refuse)
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
