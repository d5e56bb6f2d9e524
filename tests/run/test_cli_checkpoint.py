"""``shoestring checkpoint export`` and ``import`` as they are typed, and what each says about what is wrong."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_train import SMALL, rows

from launcher.cli import main
from launcher.completion import complete
from training.checkpoint.folders import find, locate

SHORT = [word for word in SMALL if not word.startswith(("run.steps", "run.sample"))]
QUICK = ("data.corpus=[text.txt]", *SHORT, "run.steps=4", "run.sample.tokens=0", "run.compile=off", "run.device=cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run called ``first`` has been, with checkpoints after 2 and 4 steps; ``published`` has its weights."""
    place = tmp_path_factory.mktemp("checkpoint")
    (place / "text.txt").write_text("".join(f"line {i}: {i * i} and {i % 7} more\n" for i in range(900)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["train", *QUICK, "run.id=first", "checkpoint.every=2"]) == 0
        assert main(["export", "first", "to=published", "shard_gigabytes=1e-4"]) == 0
    return place


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    monkeypatch.chdir(place)
    capsys.readouterr()
    yield
    for left in ("out", "runs/copy", "runs/second", "runs/third"):
        shutil.rmtree(place / left, ignore_errors=True)


def export(*words: str) -> int:
    return main(["checkpoint", "export", *words])


def list_bytes(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_the_last_checkpoint_is_published_as_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert export("first", "to=out/last", "shard_gigabytes=1e-4") == 0
    assert capsys.readouterr().out == "runs/first/checkpoints/00000004 is in out/last\n"
    assert list_bytes("out/last") == list_bytes("published")
    assert export("first", "to=out/second", "step=2", "shard_gigabytes=1e-4") == 0
    assert list_bytes("out/second").keys() == list_bytes("published").keys()
    assert list_bytes("out/second") != list_bytes("published")


def test_a_run_begins_with_what_was_imported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "import", "published", *QUICK, "run.id=second", "run.seed=7"]) == 0
    said, begin = capsys.readouterr().out.splitlines()
    assert said == "published is in runs/second/checkpoints/00000000, 0.5 MB"
    assert begin.startswith("it begins with: shoestring train") and begin.endswith(
        "run.id=second checkpoint.resume=auto"
    )
    assert main(["checkpoint", "verify", "second"]) == 0
    assert export("second", "to=out/again", "shard_gigabytes=1e-4") == 0
    assert list_bytes("out/again") == list_bytes("published")
    words = [*QUICK, "run.seed=7", "run.steps=2"]
    assert main(["train", *words, "run.id=second", "checkpoint.resume=auto"]) == 0
    assert main(["train", *words, "run.id=third", "init_from=published"]) == 0
    second, third = (rows(Path("runs") / name, "step") for name in ("second", "third"))
    assert [row["loss"] for row in second] == [row["loss"] for row in third]
    assert rows(Path("runs/second"), "resume")[0]["step"] == 0 and find(Path("runs/second/checkpoints")) == [0]


def rewrite(change: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        content = json.loads((checkpoint / "manifest.json").read_text())
        change(content)
        (checkpoint / "manifest.json").write_text(json.dumps(content))

    return apply


def damage(checkpoint: Path) -> None:
    """The last value of what is written last: an export has begun when it comes there."""
    content = json.loads((checkpoint / "manifest.json").read_text())
    (piece,) = content["tensors"]["master/mtp.0.norm.weight"]["pieces"]
    with (checkpoint / piece["file"]).open("r+b") as file:
        file.seek(piece["at"])
        file.write(b"\x01\x02\x03")


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a damaged block": (damage, "00000.safetensors: master/mtp.0.norm.weight at [0] is damaged: its checksum is not"),
    "a file": (lambda path: (path / "00000.safetensors").unlink(), "00000.safetensors: master/embedding.weight at"),
    "a shorter file": (lambda path: os.truncate(path / "00000.safetensors", 20000), "is cut short: "),
    "no manifest": (shutil.rmtree, "runs/copy/checkpoints has no checkpoint"),
    "half a manifest": (lambda path: os.truncate(path / "manifest.json", 999), "is not the manifest of a checkpoint"),
    "no facts": (rewrite(lambda c: c.update(run={"step": 4})), "00000004/manifest.json: run.tokens is missing"),
    "a precision": (
        rewrite(lambda c: c["run"]["config"].update(precision="fp2")),
        "precision must be one of bf16, fp8",
    ),  # type: ignore[attr-defined]
    "a tensor": (rewrite(lambda c: c["tensors"].pop("master/norm.weight")), "norm.weight: the model tiny has (32,)"),
    "another model": (
        rewrite(lambda c: c["run"]["config"]["model"].update(hidden=64)),  # type: ignore[index]
        "model.hidden=32 must be 64, as in the checkpoint runs/copy/checkpoints/00000004: runs/copy/config.yaml is of",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_exported_is_said(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = WRONG[what]
    checkpoint = locate(Path("runs/copy/checkpoints"), 4)
    shutil.copytree("runs/first", "runs/copy")
    shutil.rmtree(locate(checkpoint.parent, 2))
    spoil(checkpoint)
    assert export("copy", "to=out") == 2
    said = capsys.readouterr().err
    assert said.startswith("shoestring: ") and message in said and said.count("\n") == 1
    assert not Path("out/model.safetensors.index.json").exists()
    # Nothing that is left is taken for a model.
    if Path("out").exists():
        assert main(["checkpoint", "import", "out", *QUICK, "run.id=third"]) == 2
        assert "out has neither model.safetensors.index.json nor model.safetensors" in capsys.readouterr().err
    assert main(["checkpoint", "ls", "copy"]) == 0


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/file").touch()
    shutil.copytree("runs/first", "runs/copy")
    shutil.rmtree("runs/copy/checkpoints")
    wrong = {
        ("export", "first"): "to must have a value",
        ("export", "first", "to=out"): "to=out must be a folder that does not exist yet, or is empty",
        ("export", "first", "to=out/x", "step=3"): "step=3 must be one of 2, 4",
        ("export", "copy", "to=out/x"): "runs/copy/checkpoints has no checkpoint",
        ("export", "frist", "to=out/x"): "did you mean first?",
        ("exprot", "first"): "exprot must be one of ls, show, verify, prune, export, import; did you mean export?",
        ("import",): "checkpoint import needs <folder>",
        ("import", "nowhere", *QUICK, "run.id=third"): "nowhere/config.json",
        ("import", "published", *QUICK, "run.id=first"): "run.id=first is taken",
        ("import", "published", *QUICK, "run.id=first", "checkpoint.resume=auto"): "run.id=first is taken",
        (
            "import",
            "published",
            *QUICK,
            "run.id=third",
            "model.hidden=64",
        ): "model.hidden=64 must be 32, hidden_size of",
    }
    for words, message in wrong.items():
        assert main(["checkpoint", *words]) == 2, words
        assert message in capsys.readouterr().err
        assert not Path("out/x").exists() and not Path("runs/third").exists()
    assert find(Path("runs/first/checkpoints")) == [2, 4]


def test_a_full_disk_is_named_and_leaves_no_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from training.checkpoint import part

    monkeypatch.setattr(part, "name_file", lambda rank: "../../../../full")
    Path("full").symlink_to("/dev/full")
    assert main(["checkpoint", "import", "published", *QUICK, "run.id=third"]) == 2
    said = capsys.readouterr().err
    assert "published cannot be imported: [Errno 28] No space left on device, while writing " in said
    assert not Path("runs/third").exists()


def test_they_are_completed() -> None:
    assert complete("shoestring checkp") == ["checkpoint"]
    assert complete("shoestring checkpoint export fi") == ["first"]
    assert complete("shoestring checkpoint export first st") == ["step="]
    assert "run=tiny" in complete("shoestring checkpoint import published run=")
