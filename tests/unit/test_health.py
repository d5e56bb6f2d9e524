"""What watches over a run, without processes: verdicts from heartbeats, activities from stacks, sums of memory."""

import importlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parallel.doing import NOTHING, Activity, Doing, doing, read_error
from parallel.doing import read as read_doing
from training.checkpoint.part import commit, write_part
from training.chunk import Chunk
from training.health.beat import Beat, is_stopped, keep_error, locate, read_beat, read_ending, write
from training.health.config import WHERE, FailAt, Fault, HealthConfig, Phase, locate_mark, parse
from training.health.faults import DISK, ENTRANCES, GRADIENT, STEP, come_through
from training.health.fingerprint import add_up
from training.health.harm import InjectedError, spoil_checkpoint
from training.health.stacks import show_stacks
from training.health.verdict import SECOND, find_hang, find_slow

NOW = 1000 * SECOND


def beat(rank: int, action: str = "step 3 > 0F0", since: float = 60, waiting: bool = True, ago: float = 1) -> Beat:
    """A heartbeat ``ago`` seconds before now, of a rank that has done the same for ``since``."""
    times = int(NOW - ago * SECOND), int(NOW - since * SECOND)
    return Beat(rank, "here", 10 + rank, times[0], action, times[1], waiting, True, -1.0)


def hang(*beats: Beat | None) -> tuple[str, ...]:
    """The lines of the verdict on a patience of 30 seconds and heartbeats every 2; none if there is no hang."""
    found = find_hang(dict(enumerate(beats)), NOW, 30, 2)
    return found.lines if found else ()


def test_a_rank_without_a_sign_of_life_is_stuck() -> None:
    head, *lines = hang(beat(0), beat(1, "optimizer", ago=40, waiting=False), beat(2))
    assert head == "no rank has gone on for 30 s: rank 1 is stuck; ranks 0, 2 are waiting for it"
    assert lines[0].startswith("rank 1 on here (process 11): is at optimizer for 60 s, and has given no sign of life")
    assert lines[1] == "rank 0 on here (process 10): waits in step 3 > 0F0 for 60 s"


def test_a_rank_that_does_not_wait_is_stuck() -> None:
    assert hang(beat(0), beat(1, "data", waiting=False))[0].endswith("rank 1 is stuck; rank 0 is waiting for it")


def test_ranks_that_wait_for_each_other_are_said_to() -> None:
    assert hang(beat(0), beat(1))[0].endswith("no rank computes: each waits for another")


def test_a_rank_that_never_beat_is_stuck() -> None:
    lines = hang(beat(0), None)
    assert "rank 1 is stuck" in lines[0] and lines[1] == "rank 1: never gave a sign of life"


@pytest.mark.parametrize("other", [beat(1, since=5), replace(beat(1, waiting=False), watched=False)])
def test_while_one_goes_on_or_takes_its_time_there_is_no_hang(other: Beat) -> None:
    assert hang(beat(0), other) == ()


def test_who_is_stopped_is_said_to_be() -> None:
    found = find_hang({0: beat(0), 1: beat(1, ago=50)}, NOW, 30, 2, stopped=[1])
    assert found is not None and found.stuck == (1,) and found.lines[1].endswith(": it is stopped by a signal")


@pytest.mark.parametrize(
    ("busy", "slow"),
    [((0.5, 0.5, 0.5), None), ((0.5, 0.9, 0.5), 1), ((0.7, 0.9, 0.7), None), ((0.95, 0.3), 0), ((-1.0, 0.9), None)],
)
def test_a_slow_rank_computes_more_than_the_others(busy: tuple[float, ...], slow: int | None) -> None:
    found = find_slow([replace(beat(rank), busy=share) for rank, share in enumerate(busy)], 1.5)
    assert (found.rank if found else None) == slow
    if found:
        assert found.describe().startswith(f"rank {slow} is slow, or has more to do: it computes {busy[slow or 0]:.0%}")


def test_every_entrance_is_a_function() -> None:
    """A table of names would rot in silence."""
    entrances = [
        *GRADIENT,
        STEP,
        *(place for table in (ENTRANCES, DISK) for places in table.values() for place in places),
    ]
    for module, name in [place[:2] for place in entrances]:
        found = importlib.import_module(module)
        for part in name.partition(".<locals>")[0].split("."):
            found = getattr(found, part)
        while hasattr(found, "__wrapped__"):
            found = found.__wrapped__
        code = found.__code__  # type: ignore[attr-defined]
        inner = [code, *(const for const in code.co_consts if hasattr(const, "co_qualname"))]
        assert name in [each.co_qualname for each in inner], name


def test_what_is_done_is_told_from_the_outermost_in() -> None:
    going, held = threading.Event(), threading.Event()

    @doing("step {step}", 1)
    def take(inner: Callable[[], object], step: int = 6) -> object:
        with Doing("tokens of experts"):
            return inner()

    def wait() -> None:
        with Doing(waiting=True):
            going.set()
            held.wait(10)

    thread = threading.Thread(target=take, args=(wait,))
    thread.start()
    going.wait(10)
    found = read_doing(thread.ident or 0)
    held.set()
    thread.join()
    assert found == Activity("step 7 > tokens of experts", True)
    assert read_doing(thread.ident or 0) == read_doing(0) == Activity(NOTHING, False)
    for call in (lambda: take(lambda: 1 / 0, 2), lambda: take(lambda: 1 / 0, step=2)):
        with pytest.raises(ZeroDivisionError) as caught:
            call()
        assert read_error(caught.value) == "step 3 > tokens of experts"
    assert read_error(ValueError()) == NOTHING


def test_stacks_of_all_threads_are_shown() -> None:
    held = threading.Event()
    thread = threading.Thread(target=held.wait, args=(10,), name="another")
    thread.start()
    shown = show_stacks()
    held.set()
    thread.join()
    main, other = shown.split("thread another, the innermost first:\n")
    assert main.startswith("thread MainThread, the innermost first:\n") and "in show_stacks" in main
    assert "in wait" in other and "in show_stacks" not in other


def test_heartbeats_and_last_words_are_read_as_written(tmp_path: Path) -> None:
    assert read_beat(tmp_path, 3) is None and read_ending(tmp_path, 3) is None
    write(locate(tmp_path, 3, "heartbeat.json"), beat(3))
    assert read_beat(tmp_path, 3) == beat(3)
    locate(tmp_path, 3, "heartbeat.json").write_text('{"rank": 3')
    assert read_beat(tmp_path, 3) is None
    try:
        raise RuntimeError("no more")
    except RuntimeError as error:
        keep_error(tmp_path, 3, error)
    ending = read_ending(tmp_path, 3)
    assert ending is not None and ending.error == "RuntimeError: no more" and "test_heartbeats" in ending.stack


def test_a_process_that_runs_is_not_stopped() -> None:
    import os

    assert not is_stopped(os.getpid()) and not is_stopped(2**22 + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.uint8])
def test_any_flipped_bit_changes_a_sum(dtype: torch.dtype) -> None:
    whole = torch.arange(203).to(dtype)
    for view in (whole, whole[1:], whole[3:180], whole[:0], whole.view(7, 29)[:, 2:9]):
        before = add_up([view])
        assert add_up([view.clone()]) == before or not view.is_contiguous() or view.data_ptr() % 8
        if view.numel():
            flat = view if view.is_contiguous() else view[1]
            content = flat.view(-1).view(torch.uint8)
            for place in (0, len(content) // 2, len(content) - 1):
                for bit in (0, 7):
                    content[place] ^= 1 << bit
                    assert add_up([view]) != before
                    content[place] ^= 1 << bit
            assert add_up([view]) == before


def test_what_is_staged_has_the_same_sums() -> None:
    from training.checkpoint.staging import Staging

    whole = torch.randn(1001)
    chunks = [Chunk(str(n), (9,), (0,), whole[n : n + 9]) for n in range(5)]
    copies = Staging(torch.device("cpu")).take(chunks)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(chunks, copies, strict=True))
    assert add_up(c.tensor for c in copies) == add_up(c.tensor for c in chunks)


def test_every_fault_is_written_as_it_is_read() -> None:
    faults = [FailAt(0, 7, phase, kind) for kind in Fault for phase in WHERE.get(kind, tuple(Phase))]
    assert len(faults) > 50 and [parse(str(fault)) for fault in faults] == faults


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1:7:backward", "health.faults: 1:7:backward must be rank:step:phase:kind, for example 1:7:backward:kill"),
        ("a:7:backward:kill", "must be rank:step"),
        ("1:7:sideways:kill", "sideways is none of forward, all-to-all, backward"),
        ("1:7:backward:explode", "explode is none of kill, term"),
        ("1:7:staging:nan", "nan happens in backward alone"),
        ("1:7:committing:kill", "rank 0 alone is ever committing"),
    ],
)
def test_a_fault_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"health\.faults") as caught:
        HealthConfig(faults=(text,))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"heartbeat": 0.0}, "health.heartbeat=0.0 must be positive or null"),
        ({"hang": 1.0}, "health.hang=1.0 must be at least twice health.heartbeat=2.0"),
        ({"slow": 1.0}, "health.slow=1.0 must be above 1"),
        ({"verify_every": -1}, "health.verify_every=-1 must not be negative"),
    ],
)
def test_values_that_make_no_sense_are_refused(keys: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match="health") as caught:
        HealthConfig(**keys)  # type: ignore[arg-type]
    assert message in str(caught.value)


def take(folder: Path, faults: list[str], steps: Iterable[int]) -> list[str]:
    """What becomes of the optimizer in each of ``steps``: functions of the names that are looked for stand in."""
    module = {"__name__": "training.step"}
    exec("def run_step(setup, step, inner):\n    return inner()", module)  # noqa: S102
    native = {"__name__": "training.native"}
    exec("class Native:\n    def step(self):\n        return 'updated'", native)  # noqa: S102
    optimizer = native["Native"]()  # type: ignore[operator]
    found = []
    with come_through(faults, folder, folder / "checkpoints", 1, 2):
        for step in steps:
            try:
                found.append(module["run_step"](None, step, optimizer.step))  # type: ignore[operator]
            except InjectedError as error:
                found.append(str(error))
    return found


def test_a_fault_happens_once_in_its_phase_and_step(tmp_path: Path) -> None:
    failed = "health.faults asked for 1:3:optimizer:error"
    assert take(tmp_path, ["1:3:optimizer:error"], range(4)) == ["updated", "updated", failed, "updated"]
    assert take(tmp_path, ["1:3:optimizer:error"], range(4)) == ["updated"] * 4, "once in the life of a run"
    assert [path.name for path in (tmp_path / "faults").iterdir()] == ["000-1-3-optimizer-error"]
    assert sys.getprofile() is None
    none = come_through(["2:3:forward:kill"], tmp_path, tmp_path / "checkpoints", 1, 2)
    with pytest.raises(ValueError, match="there is no rank 2, only 2 in all"), none:
        pass


@pytest.mark.parametrize(("kind", "wanted"), [("kill", 1), ("corrupt", 2)])
def test_who_is_to_load_has_something_to_load(tmp_path: Path, kind: str, wanted: int) -> None:
    """The fault before waits, on a disk that is slower than the steps are; where one is spoilt, for one more."""

    def go_through() -> Iterator[int]:
        yield from range(5)
        for step in range(1, wanted + 1):
            folder = tmp_path / "checkpoints" / f"{step:08}"
            folder.mkdir(parents=True)
            yield 4 + step
            (folder / "manifest.json").touch()
        yield 5 + wanted

    found = take(tmp_path, ["1:2:optimizer:error", f"0:4:loading:{kind}"], go_through())
    assert found == ["updated"] * (5 + wanted) + ["health.faults asked for 1:2:optimizer:error"]


def test_what_a_disk_could_not_take_is_said_before_the_next_fault(tmp_path: Path) -> None:
    begun = tmp_path / "checkpoints" / "00000003"
    begun.mkdir(parents=True)
    faults = ["0:3:writing:full", "1:4:optimizer:error"]
    mark = locate_mark(tmp_path, [parse(text) for text in faults], 0)
    mark.parent.mkdir()
    mark.write_text('{"time": 1.0, "step": 3}')

    def go_through() -> Iterator[int]:
        yield from range(3, 6)
        begun.rename(begun.with_name("00000006"))  # the one after it is under way
        yield 6  # where it was not even begun, too
        (tmp_path / "metrics.jsonl").write_text('{"kind": "checkpoint_failed"}\n')
        yield 7

    assert take(tmp_path, faults, go_through()) == ["updated"] * 4 + ["health.faults asked for 1:4:optimizer:error"]


def test_a_disk_fails_as_often_as_it_is_to(tmp_path: Path) -> None:
    """A thread that survives one fault meets the next one, too."""
    module = {"__name__": "training.step"}
    exec("def run_step(setup, step, inner):\n    return inner()", module)  # noqa: S102

    def save() -> str:
        try:
            write_part(tmp_path / "out", 0, [Chunk("a", (2,), (0,), torch.ones(2))], {})
            commit(tmp_path / "out", 1)
        except OSError as error:
            with (tmp_path / "metrics.jsonl").open("a") as record:  # as a run says it
                record.write('{"kind": "checkpoint_failed"}\n')
            return str(error)
        return "saved"

    faults = ["0:1:writing:full", "0:1:committing:write", "0:1:writing:write"]
    with come_through(faults, tmp_path, tmp_path / "checkpoints", 0, 1):
        found = [module["run_step"](None, step, save) for step in range(4)]  # type: ignore[operator]
    kinds = ("No space left on device, while writing its header", "Input/output error", "Input/output error", "saved")
    assert all(kind in text for kind, text in zip(kinds, found, strict=True)), found


def test_a_spoilt_checkpoint_differs_in_a_bit(tmp_path: Path) -> None:
    """In the file that the rank itself reads next: another may have been read already."""
    paths = [tmp_path / f"{rank:05}.safetensors" for rank in range(2)]
    for path in paths:
        path.write_bytes(bytes(100))
    spoil_checkpoint({"folder": tmp_path, "rank": 1})
    contents = [path.read_bytes() for path in paths]
    assert list(map(len, contents)) == [100, 100] and list(map(sum, contents)) == [0, 1]
