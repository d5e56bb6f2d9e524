"""What is slow for a moment is measured again; what stays slow is named: two ranks at a store, of given speeds."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore

from configs.schema import RunConfig
from launcher.compose import Composer
from launcher.preflight import check, measure
from launcher.preflight.check import SPELLS, Preflight
from launcher.preflight.desk import Desk
from launcher.preflight.unfit import UnfitError

WORDS = ("parallel.dp=2", "checkpoint.save=false", "preflight.disk_megabytes=null")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return Composer().compose(WORDS)[0]


def go(config: RunConfig, folder: Path, speeds: tuple[tuple[float, ...], ...]) -> Iterator[str]:
    """What comes of two machines of a rank each, whose products have these speeds in one spell after another."""
    left = [iter(theirs) for theirs in speeds]
    store = HashStore()

    def read(desk: Desk, *_: object) -> tuple[float, list[measure.Row]]:
        return next(left[desk.rank]), []

    def take_part(rank: int) -> str:
        preflight = Preflight(config, Desk(store, rank, 2, 0, 1, f"n{rank}"), "cpu", folder)
        try:
            preflight.check_machines()
        except UnfitError as error:
            return str(error)
        return "fit"

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(check.measure, "read_product", read)
        patch.setattr(check.measure, "read_machine", lambda *_: iter(()))  # disks of a busy machine are not alike
        yield from pool.map(take_part, range(2))
    assert [len(list(rest)) for rest in left] == [0, 0], "no spell more was taken than is told of here"


@pytest.mark.parametrize(
    ("speeds", "fit"),
    [
        (((10.0,), (9.0,)), True),
        (((10.0, 10.0), (5.0, 9.0)), True),  # for a moment
        (((10.0, 4.0), (5.0, 9.0)), True),  # one after the other: of each its best counts
        (((10.0,) * SPELLS, (5.0,) * SPELLS), False),
    ],
)
def test_who_stays_slow_is_named(
    config: RunConfig, tmp_path: Path, speeds: tuple[tuple[float, ...], ...], fit: bool
) -> None:
    said = set(go(config, tmp_path, speeds))
    assert (said == {"fit"}) is fit
    assert fit or all("machine n1 unfit" in words for words in said), said
