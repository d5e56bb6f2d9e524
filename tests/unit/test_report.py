"""Which of several dead ranks is named first, from exit codes and error files."""

import signal
from pathlib import Path

import pytest

from launcher.logs import log_of
from launcher.report import describe, keep_traces, mistake, read_deaths
from training.health.beat import RECORD, Ending, locate, write

LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:4711: Connection reset by peer"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for rank in range(3):
        log_of(tmp_path, rank).parent.mkdir(parents=True)
        log_of(tmp_path, rank).write_text("".join(f"rank {rank} line {number}\n" for number in range(40)))
    return tmp_path


def keep(run: Path, rank: int, message: str, time: float) -> None:
    """The record of a rank that ended by an exception."""
    ending = Ending(rank, "", round(time * 1e9), "", message, f"Traceback\n{message}\n")
    write(locate(run, rank, RECORD), ending)


def test_a_lost_connection_is_no_root(run: Path) -> None:
    keep(run, 0, LOST, 1.0)
    deaths = read_deaths(run, {0: 1, 1: -signal.SIGKILL, 2: -signal.SIGTERM})
    assert [death.rank for death in deaths] == [1, 0, 2] and mistake(deaths) is None
    lines = describe(run, deaths).splitlines()
    assert lines[0] == "shoestring: rank 1 was ended by SIGKILL"
    assert lines[2:17] == [f"rank 1 line {number}" for number in range(25, 40)]
    assert lines[-3:-1] == ["then rank 0 lost its connection", "then rank 2 was ended by SIGTERM"]


def test_the_earliest_exception_is_the_root(run: Path) -> None:
    keep(run, 0, LOST, 1.0)
    keep(run, 1, "KeyError: 'b'", 3.0)
    keep(run, 2, "KeyError: 'a'\nand more", 2.0)
    deaths = read_deaths(run, {0: 1, 1: 1, 2: -signal.SIGTERM})
    text = describe(run, deaths)
    assert text.startswith("shoestring: rank 2 raised KeyError: 'a'\n") and text.count("Traceback") == 1
    keep_traces(run, deaths)
    assert log_of(run, 1, "stderr.log").read_text() == "Traceback\nKeyError: 'b'\n"


def test_an_exit_without_an_exception_shows_both_streams(run: Path) -> None:
    log_of(run, 2, "stderr.log").write_text("Fatal Python error: Segmentation fault\n")
    deaths = read_deaths(run, {2: 3, 1: -signal.SIGTERM})
    text = describe(run, deaths)
    assert text.startswith("shoestring: rank 2 ended with exit code 3 and no exception\n")
    assert "rank 2 line 39" in text and "Fatal Python error" in text


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGUSR2])
def test_a_rank_that_was_told_to_end_is_no_root(run: Path, told: signal.Signals) -> None:
    assert [death.rank for death in read_deaths(run, {0: -told, 1: -signal.SIGSEGV})] == [1, 0]


def test_a_mistake_counts_though_other_ranks_that_found_it_were_ended(run: Path) -> None:
    keep(run, 0, "ValueError: run.device=xpu: no such device", 1.0)
    keep(run, 1, "ValueError: run.device=xpu: no such device", 2.0)
    assert mistake(read_deaths(run, {0: -signal.SIGTERM, 1: 2})) == "run.device=xpu: no such device"
    assert mistake(read_deaths(run, {0: -signal.SIGTERM, 1: 1})) is None


def test_a_record_cut_short_is_none(run: Path) -> None:
    locate(run, 0, RECORD).write_text('{"rank": 0, "no')
    (death,) = read_deaths(run, {0: -signal.SIGKILL})
    assert death.brief == "was ended by SIGKILL"
