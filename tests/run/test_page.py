"""``shoestring report`` as it is typed: a page that shows what the run's files say, and nothing that is not theirs."""

import base64
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from page_parsed import Page, check_closed, points
from page_runs import DENSE, HOSTILE, load, make_run, start, step
from test_train import SMALL, rows

from launcher.cli import main
from training.ledger import PARTS

Report = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Where a run called ``mine`` has been, with experts and a hostile prompt; and what it printed."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 600)
    price = "cluster.price_per_device_hour=3600"
    words = (
        "run.steps=24",
        "run.eval_every=8",
        "run.id=mine",
        "checkpoint.every=10",
        price,
        f"run.sample.prompt={quote(HOSTILE)}",
    )
    with pytest.MonkeyPatch.context() as patch, (folder / "printed").open("w") as printed:
        patch.chdir(folder)
        patch.setattr("sys.stdout", printed)
        assert main(["train", "data.corpus=[text.txt]", *SMALL, *words]) == 0
    yield folder, (folder / "printed").read_text()


def quote(text: str) -> str:
    """As a word of Hydra's."""
    return '"' + text.replace('"', '\\"') + '"'


def test_a_page_of_a_run(folder: tuple[Path, str], report: Report) -> None:
    """Its figures are those of the record and of the lines that the run printed."""
    run, printed = folder[0] / "runs" / "mine", folder[1]
    text = report(run)
    found, steps, evals = Page(text), rows(run, "step"), rows(run, "eval")
    check_closed(text)
    (end,) = rows(run, "end")
    assert found.row("loss, nats a token")[0] == f"{steps[-1]['loss']:.4f}" in found.text
    assert found.row("loss, nats a token")[3] == f"{max(row['loss'] for row in steps):.4f}"
    assert found.row("gradient norm")[2] == f"{min(row['grad_norm'] for row in steps):.4g}"
    assert found.row("maximal violation, worst layer")[0] == f"{steps[-1]['violation_worst']:.4g}"
    value, unit = found.row("peak memory of rank 0")[0].split()  # what else this process has tested counts too
    bytes_ = float(value) * {"MiB": 2**20, "GiB": 2**30}[unit]
    assert bytes_ == pytest.approx(steps[-1]["peak_memory"], rel=0.01)
    assert f"{end['held_out']:.4f}" in found.text and f"a bigram model: {end['bigram']:.4f}" in found.text
    said = [title for title in found.titles if title.startswith("held out")]
    assert said == [f"held out {row['loss']:.4g} after step {row['step'] + 1}" for row in evals] and len(said) == 3
    assert (
        "finished: " in found.text
        and f"{len(rows(run, 'checkpoint'))} checkpoints, the last after step 24" in found.text
    )
    shares = dict(re.findall(r"(\w+) ([\d.]+%)", printed.splitlines()[-2]))
    assert shares and all(found.row(part)[1] == share for part, share in shares.items() if part in PARTS)
    assert found.row("all")[2] == f"{end['cost']:,.2f}" and f"cost {end['cost']:.2f}" in printed


def test_the_curve_of_the_loss_is_that_of_the_record(folder: tuple[Path, str], report: Report) -> None:
    run = folder[0] / "runs" / "mine"
    losses = [row["loss"] for row in rows(run, "step")]
    (piece,) = points(Page(report(run)).path("line a raw", "Loss, nats")[0])
    assert [x for x, _ in piece] == pytest.approx([1000 * n / 23 for n in range(24)], abs=0.06)
    (first, last) = piece[0][1], piece[-1][1]
    scale = (last - first) / (losses[-1] - losses[0])
    assert [y for _, y in piece] == pytest.approx([first + scale * (each - losses[0]) for each in losses], abs=0.2)
    assert scale < 0, "up is more"


def test_maps_show_the_loads_of_the_record(folder: tuple[Path, str], report: Report) -> None:
    run = folder[0] / "runs" / "mine"
    loads = rows(run, "load")
    assert [row["step"] for row in loads] == list(range(24))
    said = [title for title in Page(report(run)).titles if title.startswith("layer ")]
    assert len(said) == 4, "two layers in two maps"
    for place, name in enumerate(("1", "MTP 1")):
        series = [max(row["load"][place]) / sum(row["load"][place]) * 8 - 1 for row in loads]
        worst = series.index(max(series))
        last = loads[-1]["load"][place]
        most, step = f"{max(last) / sum(last) * 8:.3g}", f"in step {worst + 1:,}"
        assert any(each.startswith(f"layer {name}: {series[-1]:.3g} at last") and each.endswith(step) for each in said)
        assert any(
            each.startswith(f"layer {name}: expert {last.index(max(last))} has most, {most} times the mean")
            for each in said
        )


def test_what_a_run_says_of_itself_is_only_text(folder: tuple[Path, str], report: Report, tmp_path: Path) -> None:
    """In its name, its configuration, its overrides, its logs, its sample, its evaluations, its picture."""
    run = tmp_path / "x<b>y"
    shutil.copytree(folder[0] / "runs" / "mine", run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "device": HOSTILE, "schedule": HOSTILE, "torch": HOSTILE})
    (run / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    shutil.rmtree(run / "logs")  # nobody is alive
    (run / "logs").mkdir()
    verdict = {"rank": 0, "node": "n", "cause": "exception", "error": HOSTILE, "words": f"rank 0 raised {HOSTILE}"}
    (run / "logs" / "verdict.json").write_text(json.dumps(verdict))
    (run / "command.txt").write_text(f"shoestring train run.sample.prompt={HOSTILE}")
    (run / "sample.txt").write_text(HOSTILE)
    (run / "versions.json").write_text(
        json.dumps({"python": HOSTILE, "platform": HOSTILE, "git": {"revision": HOSTILE}})
    )
    (run / "proof.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    svg = f"<svg xmlns='http://www.w3.org/2000/svg'>{HOSTILE}</svg>"
    (run / "schedule.svg").write_text(svg)
    (run / "evaluations" / HOSTILE.replace("/", "")).mkdir(parents=True)
    result = {"sets": {HOSTILE: {"loss": 2.5, "bits_per_byte": None, "tokens": 7}}, "step": 24, "checkpoint": HOSTILE}
    (run / "evaluations" / HOSTILE.replace("/", "") / "result.json").write_text(json.dumps(result))
    ledger = [{**json.loads(line), "ending": HOSTILE} for line in (run / "ledger.jsonl").read_text().splitlines()]
    (run / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ledger * 2))
    text = report(run)
    check_closed(text)
    assert "<b>y" not in text and text.count("&lt;script&gt;") > 15
    found = Page(text)
    assert f"rank 0 raised {HOSTILE}" in found.text and HOSTILE in found.row("run.sample.prompt")[0]
    assert any(HOSTILE in cells[1] and cells[3:] == ["2.5000", "–", "7"] for cells in found.cells if len(cells) == 6)
    (picture,) = [given["src"] for tag, given in found.tags if tag == "img"]
    assert picture is not None and base64.b64decode(picture.partition("base64,")[2]).decode() == svg


def test_a_dense_model_has_no_experts(report: Report, tmp_path: Path) -> None:
    text = report(make_run(tmp_path / "run", [start(), *map(step, range(30))], DENSE))
    assert "Balance" not in text and "violation" not in Page(text).text and "Gradient norm" in text
    assert "Balance of experts" in report(make_run(tmp_path / "moe", [start(), *map(step, range(30)), load(29)]))


def test_mistakes_are_named(report: Report, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [start(), step(0)])
    assert "run=nowhere must be a run's folder or the id of a run" in report(Path("nowhere"), code=2)
    assert f"to={run} must be a file, and is a folder" in report(run, f"to={run}", code=2)
    assert "must be in a folder that is there" in report(run, f"to={tmp_path}/none/page.html", code=2)
    assert f"to={tmp_path}/{'x' * 300} cannot be written: File name too long" in report(
        run, f"to={tmp_path}/{'x' * 300}", code=2
    )
    assert "to= must be a file to write" in report(run, "to=", code=2)
    assert "there is no key too" in report(run, "too=1", code=2)
    assert not list(run.glob("*.html"))


def test_a_page_is_there_whole_or_as_it_was(report: Report, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [start(), step(0)])
    first = report(run, f"to={tmp_path}/page.html")
    (tmp_path / "page.html.partial").mkdir()
    assert "cannot be written: Is a directory" in report(run, f"to={tmp_path}/page.html", code=2)
    assert (tmp_path / "page.html").read_text() == first


def test_by_id(folder: tuple[Path, str], report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder[0])
    assert report(Path("mine")) == report(folder[0] / "runs" / "mine").replace(str(folder[0] / "runs"), "runs")
