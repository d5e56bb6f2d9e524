"""``shoestring eval`` as it is typed: what a run held out, other texts, other layouts, checkpoints, and mistakes.

The run trains in float64, so that every layout must give one number.
"""

import json
import math
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data_records import write_lines
from test_train import SMALL, rows

from launcher import folder as folders
from launcher.cli import main
from training.config import Device
from training.restore import restore

RUN = ("run.id=mine", "precision=fp64", "run.sample.tokens=0", "checkpoint.every=4", "optimizer.ema=0.5")
LONG = 32  # tokens of a sequence
Eval = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run has been, on two ranks that shared the experts."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "text.txt").write_text("".join(f"line {i}: {i * i} naïve foxes\n" for i in range(900)))
    (folder / "other").mkdir()
    for number in range(7):
        (folder / "other" / f"{number}.txt").write_text(f"text {number}: Wörter und 漢字\n" * 11)
    write_lines(folder / "talk.jsonl", ({"text": f"record {i} is {i * i}\n"} for i in range(60)))
    words = ("data.corpus=[text.txt]", *SMALL, *RUN, "parallel.dp=2", "parallel.ep=2", "verify=skip")
    subprocess.run([sys.executable, "-m", "launcher.train", *words], cwd=folder, check=True, timeout=240)
    return folder


@pytest.fixture
def measure(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Eval:
    """Calls the command; gives what it prints, or what it complains about."""
    monkeypatch.chdir(folder)

    def call(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main(["eval", *words]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return call


def result(folder: Path, run: str = "runs/mine") -> dict[str, Any]:
    """What the last evaluation left."""
    newest = max((folder / run / "evaluations").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return dict(json.loads((newest / "result.json").read_text()))


def loss(folder: Path, name: str = "held_out") -> float:
    return float(result(folder)["sets"][name]["loss"])


def nats(folder: Path, text: str) -> float:
    """The sum over all of a document and its end, by the plain model: windows as training cuts them."""
    config = folders.load_config(folder / "runs" / "mine")
    model, tokenizer = restore(config, folder / "runs" / "mine" / "weights", Device.cpu, 1)
    ids = torch.tensor([*tokenizer.encode(text).tolist(), tokenizer.eos])
    total = 0.0
    for start in range(0, len(ids) - 1, LONG):
        window = ids[start : start + LONG + 1]
        with torch.no_grad():
            likelihoods = model.logits(window[None, :-1]).log_softmax(-1)
        total -= likelihoods[0].gather(-1, window[1:, None]).sum().item()
    return total


def test_it_is_what_the_run_measured_itself(folder: Path, measure: Eval) -> None:
    recorded = rows(folder / "runs" / "mine", "end")[0]["held_out"]
    said = measure("mine", "threads=1")
    assert loss(folder) == pytest.approx(recorded, rel=1e-12)
    assert f"{recorded:.4f}" in said and "runs/mine/checkpoints/00000008 after step 8" in said
    assert result(folder)["step"] == 8 and result(folder)["sets"]["held_out"]["labels"] == 512
    # By its path, and by that of its checkpoint.
    for name in (str(folder / "runs" / "mine"), "runs/mine/checkpoints/00000008"):
        assert measure(name, "threads=1").splitlines()[-1] == said.splitlines()[-1]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("parallel.tp=2", "parallel.ep=2"), marks=pytest.mark.full),
        ("parallel.pp=2", "micro_batch=3"),
        pytest.param(("parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "micro_batch=1"), marks=pytest.mark.full),
    ],
    ids=lambda words: " ".join(word.partition(".")[2] for word in words),
)
def test_every_layout_gives_the_same_number(layout: tuple[str, ...], folder: Path) -> None:
    recorded = rows(folder / "runs" / "mine", "end")[0]["held_out"]
    command = [sys.executable, "-m", "launcher.evaluation", "mine", *layout]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert f"{recorded:.4f}" in done.stdout and done.stdout.count("held_out") == 1
    assert loss(folder) == pytest.approx(recorded, rel=1e-12)
    assert not list((folder / "runs" / "mine" / "evaluations").glob("*/logs"))


@pytest.mark.full
def test_under_torchrun(folder: Path) -> None:
    recorded = rows(folder / "runs" / "mine", "end")[0]["held_out"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*start, "-m", "launcher.evaluation", "mine", "parallel.ep=2", "threads=1"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{recorded:.4f}") == 1
    assert loss(folder) == recorded, "in the layout of the run it is what the run measured, to the bit"


def test_another_text_and_its_bits(folder: Path, measure: Eval) -> None:
    text = "a text of its own, of which all is measured: naïve\n" * 9
    (folder / "own.txt").write_text(text)
    said = measure("mine", "sets.own=own.txt", "sets.other=other", "sets.talk=talk.jsonl", "tokens=0", "threads=1")
    sets = result(folder)["sets"]
    assert list(sets) == ["own", "other", "talk"]
    size, expected = len(text.encode()), nats(folder, text)
    assert sets["own"]["labels"] == size and sets["own"]["tokens"] == size + 1
    # The first of all tokens is no label: what is known of the others stands for it too.
    bits = expected / math.log(2) / size * (size + 1) / size
    assert sets["own"]["loss"] == pytest.approx(expected / size, rel=1e-9)
    assert sets["own"]["bits_per_byte"] == pytest.approx(bits, rel=1e-9) and f"{bits:.4f}" in said
    assert sets["other"]["tokens"] == sum(len(path.read_bytes()) + 1 for path in (folder / "other").iterdir())
    assert sets["talk"]["tokens"] == sum(len(f"record {i} is {i * i}\n") + 1 for i in range(60))
    few = measure("mine", "sets.other=other", "tokens=64", "threads=1")
    assert result(folder)["sets"]["other"]["labels"] == 64 and "other" in few


def test_an_earlier_step_an_average_and_another_precision(folder: Path, measure: Eval) -> None:
    last = loss(folder) if measure("mine", "threads=1") else 0.0
    measure("mine", "step=4", "threads=1")
    assert result(folder)["step"] == 4 and loss(folder) > last + 0.01
    measure("mine", "ema=true", "threads=1")
    assert result(folder)["average"] and loss(folder) > last + 1e-3
    measure("mine", "precision=bf16", "threads=1")
    assert result(folder)["precision"] == "bf16" and 0 < abs(loss(folder) - last) < 0.01


def test_a_checkpoint_away_from_its_run(folder: Path, measure: Eval, tmp_path: Path) -> None:
    """Its manifest says what it is of; a text that reads like a reference is none."""
    there = tmp_path / "kept" / "00000008"
    shutil.copytree(folder / "runs" / "mine" / "checkpoints" / "00000008", there)
    manifest = json.loads((there / "manifest.json").read_text())
    manifest["run"]["config"]["data"]["field"] = "${oc.env:HOME}"
    (there / "manifest.json").write_text(json.dumps(manifest))
    said = measure(str(there), f"folder={tmp_path}", "threads=1")
    (path,) = (tmp_path / "evaluations").iterdir()
    assert json.loads((path / "result.json").read_text())["checkpoint"] == str(there)
    assert said.splitlines()[-1].split()[1] == f"{rows(folder / 'runs' / 'mine', 'end')[0]['held_out']:.4f}"
    assert folders.load_config(path).data.field == "${oc.env:HOME}"


def test_weights_alone(folder: Path, measure: Eval) -> None:
    """A run too short for checkpoints has its last weights."""
    shutil.copytree(folder / "runs" / "mine", folder / "runs" / "short")
    shutil.rmtree(folder / "runs" / "short" / "checkpoints")
    shutil.rmtree(folder / "runs" / "short" / "evaluations", ignore_errors=True)
    said = measure("short", "threads=1")
    recorded = rows(folder / "runs" / "mine", "end")[0]["held_out"]
    assert result(folder, "runs/short")["sets"]["held_out"]["loss"] == pytest.approx(recorded, rel=1e-12)
    assert "runs/short/weights after step 8" in said
    assert "ema=true needs a checkpoint, and runs/short has none" in measure("short", "ema=true", code=2)
    shutil.rmtree(folder / "runs" / "short" / "weights")
    assert "runs/short has no checkpoint yet, and no weights" in measure("short", code=2)


def test_a_damaged_checkpoint_is_named(folder: Path, measure: Eval) -> None:
    shutil.copytree(folder / "runs" / "mine", folder / "runs" / "broken")
    before = len(list((folder / "runs" / "broken").glob("evaluations/*")))
    for file in (folder / "runs" / "broken" / "checkpoints" / "00000008").glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[len(content) // 9 :: 100] = b"!" * len(content[len(content) // 9 :: 100])
        file.write_bytes(content)
    command = [sys.executable, "-m", "launcher.evaluation", "broken", "parallel.dp=2", "threads=1"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and ".safetensors: " in done.stderr and "Traceback" not in done.stderr
    assert len(list((folder / "runs" / "broken").glob("evaluations/*"))) == before


def test_the_parts_of_a_mixture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    words = ("data.mixture={other: 1, talk.jsonl: 1}", *SMALL, "run.steps=1", "run.id=mixed", "data.held_out=0.3")
    assert main(["train", *words, "run.sample.tokens=0", "precision=fp32"]) == 0
    assert main(["eval", "mixed", "threads=1"]) == 0
    sets = result(folder, "runs/mixed")["sets"]
    assert list(sets) == ["other", "talk.jsonl"] and all(0 < row["bits_per_byte"] < 20 for row in sets.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("none",), "run=none must be a run's folder or the id of a run in runs/; and it is no checkpoint's folder"),
        (("mine", "step=5"), "step=5 must be one of 4, 8"),
        (("runs/mine/checkpoints/00000004", "step=4"), "step=4 must be left out"),
        (("mine", "sets.a=nowhere"), "data.corpus=nowhere: no such file or folder"),
        (("mine", "sets=nowhere"), "sets=nowhere must be a mapping in braces"),
        (("mine", "tokens=-1"), "tokens=-1 must be at least 0"),
        (("mine", "micro_batch=0"), "micro_batch=0 must be at least 1"),
        (("mine", "parallel.engine=fsdp2"), "parallel.engine=fsdp2 must be left out"),
        (("mine", "parallel.tp=3"), "parallel.tp=3"),
        (("mine", "parallel.pp=5"), "model.num_layers=2 must be at least the number of pipeline stages, 5"),
        (("mine", "include=here"), "include=here needs tasks"),
        (("mine", "tasks=[a]", "sets.a=b"), "sets must be left out with tasks=[a]"),
        (("mine", "tasks=[a]", "parallel.dp=2"), "parallel.* must be left out with tasks"),
        (("mine", "optimizer.lr=1"), "there is no key optimizer.lr"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], message: str, folder: Path, measure: Eval) -> None:
    before = len(list((folder / "runs" / "mine").glob("evaluations/*")))
    said = measure(*words, code=2)
    assert message in said and len(said.splitlines()) <= 2
    assert len(list((folder / "runs" / "mine").glob("evaluations/*"))) == before


TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{folder}/questions.jsonl"}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: {metric}
"""


@pytest.fixture
def tasks(folder: Path) -> Path:
    """A folder with a question of our own, which the text that was trained on answers, and with a text."""
    there = folder / "tasks"
    there.mkdir(exist_ok=True)
    choices = ["qqqq", " foxe"]
    write_lines(
        there / "questions.jsonl",
        ({"question": f"{i} naïve", "choices": choices, "answer": int(i < 15)} for i in range(20)),
    )
    kinds = {"foxes": ("multiple_choice", "acc"), "whole": ("loglikelihood_rolling", "bits_per_byte")}
    for name, (kind, metric) in kinds.items():
        task = TASK.format(name=name, folder=there, kind=kind, metric=metric)
        task = task if name == "foxes" else task.replace('doc_to_text: "{{question}}"', 'doc_to_text: ""')
        (there / f"{name}.yaml").write_text(task.replace('"{{answer}}"', '"{{question}}"') if name == "whole" else task)
    return there


def test_tasks_of_the_harness(folder: Path, tasks: Path, measure: Eval, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness' own
        said = measure("mine", "tasks=[foxes,whole]", f"include={tasks}", "threads=1")
    assert "|foxes" in said and "runs/mine/checkpoints/00000008 after step 8" in said
    found = result(folder)["tasks"]
    newest = max((folder / "runs" / "mine" / "evaluations").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert json.loads((newest / "request.json").read_text())["tasks"] == ["foxes", "whole"]
    assert result(folder)["precision"] == "fp64"
    # By the plain model: the mean over questions.
    config = folders.load_config(folder / "runs" / "mine")
    model, tokenizer = restore(config, folder / "runs" / "mine" / "weights", Device.cpu, 1)
    right, lost, size = 0, 0.0, 0
    for line in (tasks / "questions.jsonl").read_text().splitlines():
        row = json.loads(line)
        scores = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer.encode(row["question"] + choice).tolist()])
            likelihoods = model.logits(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])
            scores.append(likelihoods[0, -len(choice.encode()) :].sum().item())
        right += scores.index(max(scores)) == row["answer"]
        ids = torch.tensor([[tokenizer.eos, *tokenizer.encode(row["question"]).tolist()]])
        lost -= model.logits(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None]).sum().item()
        size += len(row["question"].encode())
    assert found["foxes"]["acc,none"] == right / 20 and found["whole"]["bits_per_byte,none"] == pytest.approx(
        lost / math.log(2) / size, rel=1e-6
    )


@pytest.mark.full  # all tasks of the harness are listed: ten seconds
def test_a_task_that_is_none(tasks: Path, measure: Eval) -> None:
    assert "there is no task foxen; did you mean foxes" in measure("mine", "tasks=[foxen]", f"include={tasks}", code=2)


def test_tasks_without_the_harness(folder: Path, measure: Eval, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.evaluation.tasks.find_spec", lambda name: None)
    assert "tasks=[a] needs lm-eval: pip install" in measure("mine", "tasks=[a]", code=2)
