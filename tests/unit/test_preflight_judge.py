"""Who is unfit: an outlier in each check is named, with its machine, and no other; among the healthy, nobody."""

from itertools import pairwise
from random import Random

import pytest
from small_models import make_config

from configs.preflight import OnFailure, PreflightConfig
from configs.schema import RunConfig
from launcher.preflight.judge import (
    Check,
    Finding,
    Sample,
    at_least,
    equal,
    judge,
    like_the_best,
    name_unfit,
    near,
    nothing,
    together,
    within,
)
from launcher.preflight.network import join_groups, join_links
from launcher.preflight.report import show_findings
from launcher.preflight.verdict import Scale, reach
from training.config import CheckpointConfig, OptimizerConfig, RunSection
from training.data.config import DataConfig

NODES = [f"n{n}" for n in range(6)]
SCALE = Scale(world=24, here=4, kind="cuda")


def make(**how: object) -> RunConfig:
    return RunConfig(
        model=make_config(vocab_size=264),
        data=DataConfig(sequence_length=16),
        optimizer=OptimizerConfig(lr=1e-3),
        run=RunSection(name="small", steps=1, global_batch=24, micro_batch=1),
        checkpoint=CheckpointConfig(near_every=1),
        preflight=PreflightConfig(**how),  # type: ignore[arg-type]
    )


def draw(seed: int) -> dict[str, list[Sample]]:
    """What six healthy machines of four devices each say, with noise of a few per cent where there is some."""
    random = Random(seed)  # noqa: S311

    def machines(value: object, noise: float = 0.0) -> list[Sample]:
        return [Sample((node,), "", _shake(value, noise)) for node in NODES]

    def devices(value: object, noise: float = 0.0) -> list[Sample]:
        return [Sample((node,), f"device {n}", _shake(value, noise)) for node in NODES for n in range(4)]

    def _shake(value: object, noise: float) -> object:  # type: ignore[misc]
        return value * random.uniform(1 - noise, 1 + noise) if noise else value  # type: ignore[operator]

    groups = [((a, b), f"ranks {4 * i}, {4 * i + 4}") for i, (a, b) in enumerate(pairwise(NODES))]
    return {  # type: ignore[return-value]
        "devices": machines(4.0),
        "device": devices(""),
        "uncorrected errors": devices(0),
        "rows to be replaced": devices(False),
        "rows not replaced": devices(False),
        "margin of temperature": devices(40.0, 0.3),
        "slowed down": devices(""),
        "power cap": devices(""),
        "highest clock": devices(1980),
        "highest memory clock": devices(2619),
        "clock": devices(1755.0, 0.1),
        "links": devices(18.0),
        "generation of PCIe": devices(5),
        "width of PCIe": devices(""),
        "product": devices(600_000.0, 0.1),
        "disk": machines(800.0, 0.15),
        "writing": [],
        "free space": machines(4000.0, 0.1),
        "memory": machines(900.0, 0.1),
        "shared memory": machines(400.0, 0.1),
        "open files": machines(1048576.0),
        "clock of the machine": [Sample((node,), "", random.uniform(-0.2, 0.2)) for node in NODES],
        "version of driver": machines("580.65.06"),
        "sending": machines(380.0, 0.15),
        "receiving": machines(380.0, 0.15),
        "bandwidth of ep": [Sample(nodes, ranks, _shake(40_000.0, 0.15)) for nodes, ranks in groups],  # type: ignore[arg-type]
        "latency of ep": [Sample(nodes, ranks, _shake(60.0, 0.4)) for nodes, ranks in groups],  # type: ignore[arg-type]
    }


PLANTED = {
    "devices": (3.0, "3, should be at least 4"),
    "device": ("has fallen off the bus", "has fallen off the bus"),
    "uncorrected errors": (2, "2 of its memory"),
    "rows to be replaced": (True, "a row of its memory is to be replaced at the next reset"),
    "rows not replaced": (True, "no row of its memory was left to replace a bad one"),
    "margin of temperature": (1.0, "1 C, should be at least 3 C"),
    "slowed down": ("hardware thermal slowdown", "by hardware thermal slowdown"),
    "power cap": ("300 of 700 W", "300 of 700 W"),
    "highest clock": (1200, "1200 MHz, 1980 MHz on 23 of 24"),
    "highest memory clock": (1593, "1593 MHz, 2619 MHz on 23 of 24"),
    "clock": (345.0, "345 MHz, its peers 1"),
    "links": (17.0, "17 NVLinks up, others 18 NVLinks up"),
    "generation of PCIe": (3, "3, others 5"),
    "width of PCIe": ("x8 of x16", "x8 of x16"),
    "product": (290_000.0, "290,000.0 GFLOP/s, its peers"),
    "disk": (90.0, "90 MB/s, its peers"),
    "free space": (0.0, "0.0 GB, should be at least"),
    "memory": (0.0, "0.0 GB, should be at least"),
    "shared memory": (0.06, "0.06 GB, should be at least 0.2"),
    "open files": (1024.0, "1,024, should be at least 1,408"),
    "clock of the machine": (-3.0, "s from the others"),
    "version of driver": ("570.12", "570.12, 580.65.06 on 5 of 6"),
    "sending": (41.0, "41.00 Gbit/s, its peers"),
    "receiving": (41.0, "41.00 Gbit/s, its peers"),
    "bandwidth of ep": (4_000.0, "4,000 MB/s, its peers"),
    "latency of ep": (900.0, "900 us, its peers"),
}


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_named_among_the_healthy(seed: int) -> None:
    assert reach(make(), SCALE, draw(seed)).findings == []


@pytest.mark.parametrize("check", PLANTED)
def test_an_outlier_is_named_and_no_other(check: str) -> None:
    value, words = PLANTED[check]
    for place in (0, 3, -1):
        samples = draw(7)
        planted = samples[check][place] = samples[check][place]._replace(value=value)
        verdict = reach(make(), SCALE, samples)
        (finding,) = verdict.findings
        assert (finding.nodes, finding.subject, finding.check) == (planted.nodes, planted.subject, check)
        assert words in finding.words and finding.hint
        assert set(verdict.unfit) == (set(planted.nodes) if len(planted.nodes) == 1 else set())
        assert "FAILED" in (shown := verdict.show(6, 1.0, False)) and finding.hint in shown


def test_every_check_has_an_outlier_planted() -> None:
    names = {check.name for check in reach(make(), SCALE, draw(0)).checks if " inside" not in check.name}
    left = {f"{what} of {axis}" for what in ("bandwidth", "latency") for axis in ("pp", "dp", "tp")}
    assert names - PLANTED.keys() == left | {"writing"}


def test_what_cannot_be_written_is_named() -> None:
    samples = draw(1) | {"writing": [Sample(("n2",), "", "No space left on device in /full")]}
    verdict = reach(make(), SCALE, samples)
    assert verdict.unfit == {"n2": "writing: No space left on device in /full"}
    assert verdict.refuse(OnFailure.exclude) == (
        "preflight: 1 finding, machine n2 unfit: named in excluded.json, for the next attempt to do without"
    )


def test_floors_are_the_user_s() -> None:
    samples = draw(2)
    everywhere = [sample._replace(value=100.0) for sample in samples["disk"]]
    assert not reach(make(), SCALE, samples | {"disk": everywhere}).findings
    found = reach(make(disk_megabytes=200.0), SCALE, samples | {"disk": everywhere}).findings
    assert [finding.nodes for finding in found] == [(node,) for node in NODES]
    assert found[0].words == "100 MB/s, should be at least 200 MB/s"
    assert len(reach(make(link_gigabits=1000.0), SCALE, samples).unfit) == 6


def by(rule: object, *values: object) -> list[str]:
    """What a check of ``rule`` says of ``values``, each of a machine of its own."""
    check = Check("x", rule, "{}", "")  # type: ignore[arg-type]
    samples = {"x": [Sample((str(n),), "", value) for n, value in enumerate(values)]}  # type: ignore[arg-type]
    return [finding.nodes[0] for finding in judge([check], samples)]


def test_what_was_not_measured_is_nobody_s_peer() -> None:
    assert by(near(1.5), 10.0, None, 10.0, None, 5.0) == ["4"]
    assert by(equal, None, "a", "b", "a", None) == ["2"]
    assert by(like_the_best, None, 17, 18) == ["1"] and by(like_the_best, None) == []
    assert by(within(1.0)) == by(near(1.5), 3.0) == by(nothing, None, 0, "", False) == []


def test_one_of_two_that_is_slower_is_named_alone() -> None:
    assert by(near(1.5), 10.0, 5.0) == ["1"] and by(near(1.5), 5.0, 10.0) == ["0"]
    assert by(near(1.5), 10.0, 7.0) == by(near(1.5), 0.0, 0.0) == []
    late = near(2.0, larger_is_better=False, slack=100.0)
    assert by(late, 10.0, 110.0) == [] and by(late, 10.0, 130.0) == ["1"]


def test_most_decide_what_is_right_and_of_as_many_the_first() -> None:
    assert by(equal, "b", "a", "a") == ["0"] and by(equal, "a", "b") == ["1"]
    assert by(together(at_least(5.0), near(1.5)), 4.0, 4.0, 9.0) == ["0", "1"]


def test_a_slow_machine_is_told_from_those_it_talks_to() -> None:
    """The third of five sends slowly: who gets from it is fast with others."""
    nodes = [f"n{n}" for n in range(5)]
    rows = [("link", [n, (n + apart) % 5], 1.0 if n == 2 else 10.0 + n / 10) for apart in (1, 2, 3) for n in range(5)]
    config = make()
    assert set(reach(config, SCALE, join_links(rows, nodes)).unfit) == {"n2"}
    slow_ear = [(name, ends, 1.0 if ends[1] == 3 else 10.0) for name, ends, _ in rows]
    assert set(reach(config, SCALE, join_links(slow_ear, nodes)).unfit) == {"n3"}
    two = join_links([("link", [0, 1], 9.0), ("link", [1, 0], 1.0)], nodes)
    assert set(two) == {"sending"} and set(reach(config, SCALE, two).unfit) == {"n1"}


def test_a_group_over_several_machines_excludes_none_of_them() -> None:
    rows = [("bandwidth of ep", [0, 1], 9.0)] * 2 + [("bandwidth of ep", [2, 3], 1.0), ("bandwidth of ep", [2, 3], 3.0)]
    verdict = reach(make(), SCALE, join_groups(rows, ["a", "b", "c", "d"], "cuda"))
    assert [(found.nodes, found.subject) for found in verdict.findings] == [(("c", "d"), "ranks 2, 3")]
    assert verdict.unfit == {} and "no machine unfit by itself" in verdict.refuse(OnFailure.exclude)
    inside = join_groups(rows, ["a", "a", "c", "c"], "cpu")
    assert list(inside) == ["bandwidth of ep inside"] and not reach(make(), SCALE, inside).findings
    assert set(reach(make(), SCALE, join_groups(rows, ["a", "a", "c", "c"], "cuda")).unfit) == {"c"}


def test_all_that_is_wrong_with_a_machine_is_its_reason() -> None:
    found = [Finding(("a",), "device 1", "x", "bad", "do"), Finding(("a",), "", "y", "worse", "do that")]
    assert name_unfit([*found, Finding(("a", "b"), "ranks 0, 1", "z", "slow", "")]) == {
        "a": "device 1: x: bad; y: worse"
    }
    assert show_findings(found) == "a, device 1: x: bad\n    do\na: y: worse\n    do that"


@pytest.mark.parametrize("how", [{"slow": 1.0}, {"clock": 0.0}, {"disk_megabytes": -1.0}, {"link_gigabits": 0.0}])
def test_a_threshold_that_is_none_is_refused(how: dict[str, float]) -> None:
    ((name, value),) = how.items()
    with pytest.raises(ValueError, match=f"^preflight.{name}={value} must be "):
        PreflightConfig(**how)  # type: ignore[arg-type]
