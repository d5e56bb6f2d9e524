"""``shoestring layout`` as a user types it: what it prints is read back and compared with the topology."""

import subprocess
import sys
from pathlib import Path

import pytest

from launcher import cli
from parallel.topology import Axis, Topology
from parallel.traffic import GROUPS

AXES = (Axis.pp, Axis.dp, Axis.cp, Axis.tp, Axis.edp, Axis.ep)
LARGE = ("run=deepseek_v3", "parallel.dp=16", "parallel.tp=8", "parallel.ep=32")


def lines(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert cli.main(["layout", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def read_ranks(text: list[str]) -> dict[int, list[int]]:
    """Rank -> its node and its coordinates."""
    first = next(number for number, line in enumerate(text) if line.split()[:2] == ["rank", "node"]) + 1
    rows = [line.split() for line in text[first : text.index("", first)] if line.strip() != ".."]
    return {int(row[0]): [int(cell) for cell in row[1:]] for row in rows}


def read_groups(text: list[str]) -> dict[str, tuple[list[int], str]]:
    """Axis -> the three numbers behind it, and the line below."""
    at = next(number for number, line in enumerate(text) if line.startswith("axis"))
    found = {}
    for number, line in enumerate(text[at + 1 :], start=at + 1):
        if not line.startswith(" "):
            name, *numbers = line.split()[:4]
            below = text[number + 1] if number + 1 < len(text) and text[number + 1].startswith(" ") else ""
            found[name] = [int(cell) for cell in numbers], below.strip()
    return found


@pytest.mark.parametrize(
    "topology", [Topology(dp=4, tp=2, ep=4), Topology(dp=8, ep=8), Topology(dp=4, tp=4, ep=2)], ids=str
)
def test_a_small_world_is_shown_whole(topology: Topology, capsys: pytest.CaptureFixture[str]) -> None:
    degrees = (f"parallel.dp={topology.dp}", f"parallel.tp={topology.tp}", f"parallel.ep={topology.ep}")
    text = lines(capsys, *degrees, "cluster.devices_per_node=4")
    assert read_ranks(text) == {
        rank: [rank // 4, *(topology.coordinate(rank, axis) for axis in AXES)] for rank in range(topology.world)
    }
    groups = read_groups(text)
    assert set(groups) == {axis for axis, _ in GROUPS}
    for axis in map(Axis, groups):
        (count, size, crossing), shown = groups[axis]
        expected = list(topology.groups(axis))
        assert (count, size) == (len(expected), topology.degree(axis))
        assert crossing == sum(len({rank // 4 for rank in group}) > 1 for group in expected)
        if size > 1:
            assert [tuple(map(int, group.split())) for group in shown.split("|")] == expected
        else:
            assert shown == ""


def test_what_a_rank_has_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    first, dp, tp, ep, *_ = lines(capsys, "parallel.dp=4", "parallel.tp=2", "parallel.ep=4", "run.micro_batch=1")
    assert first.startswith("tiny: 8 ranks on 1 node of 8 devices: pp=1 dp=4 cp=1 tp=2 edp=2 ep=4")
    assert "2 of 8 sequences a step, 1 at a time" in dp
    assert "128 of 256 tokens of a sequence and 2 of 4 heads" in tp
    assert "2 of 8 routed experts a layer; every expert has 2 holders" in ep


def test_a_dense_model_has_no_experts_to_speak_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert not any("routed experts a layer" in line for line in lines(capsys, "model.moe={experts: 0}"))


def test_a_large_world_is_cut_short(capsys: pytest.CaptureFixture[str]) -> None:
    text = lines(capsys, *LARGE)
    assert len(text) < 40 and max(map(len, text)) < 121
    assert list(read_ranks(text)) == [*range(8), 127]
    groups = read_groups(text)
    assert groups["tp"] == ([16, 8, 0], "0-7 | 8-15 | .. | 120-127")
    assert groups["ep"] == ([4, 32, 4], "0-31 | 32-63 | 64-95 | 96-127")
    assert groups["replicas"] == ([8, 16, 8], "0 8 .. 120 | 1 9 .. 121 | .. | 7 15 .. 127")
    assert groups["edp"] == ([32, 4, 32], "0 32 64 96 | 1 33 65 97 | .. | 31 63 95 127")


def test_nodes_of_another_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_groups(lines(capsys, *LARGE, "cluster.devices_per_node=32"))["ep"][0] == [4, 32, 0]
    assert read_groups(lines(capsys, *LARGE, "cluster.devices_per_node=4"))["tp"][0] == [16, 8, 16]


def test_a_cluster_has_a_rank_on_each_device(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("run=tiny", "cluster=slurm", "cluster.nodes=2", "cluster.devices_per_node=2", "run.micro_batch=1")
    first = lines(capsys, *words, "parallel.pp=2")[0]
    assert first.startswith("tiny: 4 ranks on 2 nodes of 2 devices: pp=2 dp=2 ")


def test_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    first, _, *rows = lines(capsys, "77", *LARGE)
    assert first == "rank 77 of 128: device 5 of node 9; pp 0, dp 9, cp 0, tp 5, edp 2, ep 13"
    shown = {row.split()[0]: row.split(maxsplit=3)[1:] for row in rows}
    assert shown["tp"][:2] == ["5", "8"] and shown["tp"][2].startswith("72-79: activations")
    assert shown["edp"][:2] == ["2", "4"] and shown["edp"][2].startswith("13 45 77 109: gradients")
    assert set(shown) == {axis for axis, _ in GROUPS}


def test_every_rank_of_a_small_world(capsys: pytest.CaptureFixture[str]) -> None:
    topology = Topology(dp=4, tp=2, ep=4)
    for rank in range(8):
        _, _, *rows = lines(capsys, str(rank), "parallel.dp=4", "parallel.tp=2", "parallel.ep=4")
        for row in rows:
            axis, place, _, ranks = row.partition(":")[0].split(maxsplit=3)
            assert tuple(map(int, ranks.split())) == topology.group(rank, Axis(axis))
            assert int(place) == topology.coordinate(rank, Axis(axis))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("8", "parallel.dp=8"), "rank=8 must be a number from 0 to 7: there are pp=1 dp=8 cp=1 tp=1 = 8 ranks"),
        (("first",), "rank=first must be a number from 0 to 0"),
        (("-1",), "-1 is not a flag of layout"),
        (("1", "2"), "2 must be written as key=value"),
        (("parallel.ep=2",), "parallel.ep=2 must divide dp*cp*tp = 1*1*1 = 1"),
        (("parallel.dp=16",), "run.global_batch=8 must be divisible by parallel.dp=16"),
        (
            ("run=deepseek_v3", "parallel.pp=62"),
            "model.num_layers=61 must be at least the number of pipeline stages, 62",
        ),
    ],
)
def test_mistakes(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["layout", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"shoestring: {message}") and len(err.splitlines()) == 1


def test_nothing_heavy_is_loaded(tmp_path: Path) -> None:
    """16,384 ranks, in a process of its own."""
    words = ["77", "run=deepseek_v3", "parallel.dp=128", "parallel.tp=128", "parallel.ep=256"]
    code = (
        "import sys; from launcher import cli\n"
        f"codes = [cli.main(['layout', *words]) for words in ({words}, {words[1:]})]\n"
        "print(codes, sorted({'torch', 'numpy'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.startswith("rank 77 of 16384: ") and run.stdout.endswith("[0, 0] []\n") and run.stderr == ""
    assert not list(tmp_path.iterdir())


def test_a_verb_is_a_module_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher.layout", "0", "parallel.tp=2"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.startswith("rank 0 of 2: ") and run.stderr == ""


def read_stages(text: list[str]) -> dict[int, tuple[str, str, str]]:
    """Stage -> cost share, pipeline ranks, and what it has."""
    at = next(number for number, line in enumerate(text) if line.split()[:2] == ["stage", "cost"])
    rows = [line for line in text[at + 1 : text.index("", at)] if line.strip() != ".."]
    return {int(row[:6]): (row[6:12].strip(), row[15:27].strip(), row[27:]) for row in rows}


@pytest.mark.parametrize(
    ("schedule", "holders"),
    [
        ("1f1b", ["0", "1"]),
        ("zb_v", ["0", "1", "1", "0"]),
        ("interleaved_1f1b parallel.pipeline.virtual=2", ["0", "1", "0", "1"]),
        ("dualpipe", ["0 1", "0 1"]),
    ],
)
def test_stages_and_who_has_them(schedule: str, holders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = f"parallel.pp=2 run.micro_batch=1 model.num_layers=9 parallel.pipeline.schedule={schedule}".split()
    text = lines(capsys, *words)
    stages = read_stages(text)
    assert [where for _, where, _ in stages.values()] == holders
    first, *_, last = (what for *_, what in stages.values())
    assert "embedding" in first and last.endswith("embedding, norm, head, MTP")
    ends = [what.split(",")[0].split("-") for *_, what in stages.values()]
    layers = [layer for first, *rest in ends for layer in range(int(first), int(rest[0] if rest else first) + 1)]
    assert layers == list(range(9))
    assert abs(sum(int(share.rstrip("%")) for share, *_ in stages.values()) - 100) <= len(stages) / 2
    of_rank = read_stages(lines(capsys, "1", *words))
    assert of_rank == {stage: row for stage, row in stages.items() if "1" in row[1].split()}
    assert any(line.startswith(f"  pp  {words[3].partition('=')[2]}") and "8 micro-batches" in line for line in text)


def test_layers_as_they_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    stages = read_stages(lines(capsys, "parallel.pp=3", "parallel.pipeline.layers=[1,2,1]"))
    assert [what.split(",")[0] for *_, what in stages.values()] == ["0", "1-2", "3"]


def test_many_stages_are_cut_short(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("run=deepseek_v3", "parallel.pp=16", "parallel.dp=64", "parallel.pipeline.schedule=dualpipev")
    assert list(read_stages(lines(capsys, *words))) == [*range(8), 31]


def test_one_stage_is_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert not any(line.split()[:1] == ["stage"] and "cost" in line for line in lines(capsys, "parallel.dp=2"))
