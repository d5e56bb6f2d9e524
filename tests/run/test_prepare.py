"""``shoestring prepare`` as it is typed: whole, killed, twice at once, with damage, with odd input."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

COMMAND = [sys.executable, "-m", "launcher.prepare"]
LINE = "The quick brown fox, number {}, jumps over the lazy dog; naïve words, 漢字 and 🙂 follow.\n"


def prepare(*overrides: str, folder: Path, code: int = 0) -> str:
    """Runs the command in ``folder``; returns what it printed."""
    done = subprocess.run([*COMMAND, *overrides], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def start(*overrides: str, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, *overrides], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def fingerprint(data: Path) -> dict[str, str]:
    """Every file below ``data`` and the digest of its content."""
    files = (path for path in sorted(data.rglob("*")) if path.is_file())
    return {str(path.relative_to(data)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 MB of text: many small files, and one that is cut into pieces and shards."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(300):
        (folder / f"{i:03}.txt").write_text("".join(LINE.format(j) for j in range(i)))
    (folder / "long.md").write_text("".join(LINE.format(j) for j in range(100_000)))
    return folder


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The token files of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    printed = prepare(f"data.corpus=[{text}]", folder=folder)
    assert "is ready" in printed and "all whole" in printed
    return folder / "data"


def test_folder_is_what_it_should_be(whole: Path, text: Path) -> None:
    (folder,) = whole.iterdir()
    index = json.loads((folder / "index.json").read_text())
    assert index["dtype"] == "<u2" and len(index["splits"]["train"]) > 10
    names = {row["file"] for rows in index["splits"].values() for row in rows}
    listings = {f"{split}.documents.jsonl" for split in ("train", "held_out")}
    assert {path.name for path in folder.iterdir()} == names | listings | {"index.json", "lock"}
    size = sum(path.stat().st_size for path in text.iterdir())
    documents = sum(row["documents"] for rows in index["splits"].values() for row in rows)
    assert documents == 300, "the first file is empty and no document"
    assert sum(row["tokens"] for rows in index["splits"].values() for row in rows) == size + documents


def test_second_time_only_checks(whole: Path, text: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert "all whole" in prepare(f"data.corpus=[{text}]", folder=whole.parent)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_workers_change_nothing(whole: Path, text: Path, tmp_path: Path) -> None:
    prepare(f"data.corpus=[{text}]", "data.workers=5", folder=tmp_path)
    assert fingerprint(tmp_path / "data") == fingerprint(whole)


def test_killed_again_and_again_it_comes_out_the_same(whole: Path, text: Path, tmp_path: Path) -> None:
    """SIGKILL, each time a few shards further; the next run starts while the last one's workers may still notice."""
    kills = 0
    for shards in (0, 2, 5):
        process = start(f"data.corpus=[{text}]", "data.workers=2", folder=tmp_path)
        while process.poll() is None:
            journals = list(tmp_path.glob("data/*/journal.jsonl"))
            if journals and journals[0].read_bytes().count(b"\n") >= shards:
                process.kill()
                kills += process.wait() == -signal.SIGKILL
                break
            time.sleep(0.001)
        assert process.stderr
        process.stderr.close()
    assert kills
    prepare(f"data.corpus=[{text}]", folder=tmp_path)
    assert fingerprint(tmp_path / "data") == fingerprint(whole)


def test_workers_end_when_nobody_listens(text: Path, tmp_path: Path) -> None:
    """The parent alone is killed: its workers notice, and leave nothing that disturbs the next run."""
    process = start(f"data.corpus=[{text}]", "data.workers=2", folder=tmp_path)
    while not list(tmp_path.glob("data/*/journal.jsonl")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=120)  # standard error is shared with the workers: it ends when they have
    prepare(f"data.corpus=[{text}]", folder=tmp_path)
    assert not list((tmp_path / "data").rglob("*.partial"))


def test_interrupted_it_says_so_and_continues(text: Path, tmp_path: Path) -> None:
    process = start(f"data.corpus=[{text}]", "data.workers=1", folder=tmp_path)
    while not list(tmp_path.glob("data/*/journal.jsonl")):
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and b"Traceback" not in errors
    prepare(f"data.corpus=[{text}]", folder=tmp_path)


@pytest.mark.parametrize("moment", ["before any shard", "between", "before the index", "before the journal goes"])
def test_every_moment_is_a_good_one_to_stop(whole: Path, text: Path, tmp_path: Path, moment: str) -> None:
    """The states a crash can leave behind, made from the end backwards."""
    (made,) = whole.iterdir()
    folder = tmp_path / "data" / made.name
    subprocess.run(["cp", "-r", made, folder.parent.parent], check=True)
    folder.parent.mkdir()
    (tmp_path / made.name).rename(folder)
    index = json.loads((folder / "index.json").read_text())
    rows = [list(row.values()) for rows in index["splits"].values() for row in rows]
    journal = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{rows[0][0]}.12345.partial").write_bytes(b"half")
    if moment != "before the journal goes":
        (folder / "index.json").rename(folder / "index.json.partial")
    if moment == "before any shard":
        journal = ""
        for row in rows[1:]:
            (folder / row[0]).unlink()
        (folder / "train.documents.jsonl").unlink()
    elif moment == "between":
        journal = journal[: len(journal) // 2]  # ends in the middle of a line
        (folder / rows[0][0]).write_bytes(b"torn by a power cut")
    (folder / "journal.jsonl").write_text(journal)
    prepare(f"data.corpus=[{text}]", folder=tmp_path)
    assert fingerprint(tmp_path / "data") == fingerprint(whole)


def test_two_at_once_take_turns(whole: Path, text: Path, tmp_path: Path) -> None:
    processes = [start(f"data.corpus=[{text}]", "data.workers=2", folder=tmp_path) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    for process in processes:
        process.communicate()
    assert fingerprint(tmp_path / "data") == fingerprint(whole)


def test_damage_is_named_and_mended(text: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "text"
    corpus.mkdir()
    for path in sorted(text.glob("*.txt"))[:100]:
        os.link(path, corpus / path.name)
    words = (f"data.corpus=[{corpus}]",)
    prepare(*words, folder=tmp_path)
    before = fingerprint(tmp_path / "data")
    (shard,) = (tmp_path / "data").rglob("train-00000.tokens")
    content = shard.read_bytes()
    shard.write_bytes(content[:1000] + b"\xff" + content[1001:])
    assert f"{shard.relative_to(tmp_path)} is corrupted" in prepare(*words, folder=tmp_path, code=2)
    shard.write_bytes(content[:-1])
    assert f"{shard.relative_to(tmp_path)} is truncated" in prepare(*words, folder=tmp_path, code=2)
    shard.unlink()
    prepare(*words, folder=tmp_path)
    assert fingerprint(tmp_path / "data") == before


def test_a_changed_corpus_is_noticed(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(LINE.format(i))
    words = ("data.corpus=[.]", "data.folder=out", "data.held_out=0.2")
    prepare(*words, folder=tmp_path)
    (tmp_path / "0.txt").write_text(LINE.format(99))
    assert "data.corpus has changed since out/" in prepare(*words, folder=tmp_path)
    assert "changed" not in prepare(*words, folder=tmp_path)
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([LINE], trainer)
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_tokenizer_file_and_its_changes(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(LINE.format(i) * 3)
    words = ("data.corpus=[text]", "data.tokenizer=tokenizer.json", "data.held_out=0.2")
    assert "tokenizer tokenizer.json, vocabulary 300" in prepare(*words, folder=tmp_path)
    (folder,) = (tmp_path / "data").iterdir()
    content = json.loads(tokenizer.read_text())
    content["model"]["merges"].pop()
    tokenizer.write_text(json.dumps(content))
    assert "data.tokenizer has changed since" in prepare(*words, folder=tmp_path)
    assert "prepared with another" in prepare(f"data.corpus=[{folder}]", *words[1:], folder=tmp_path, code=2)


def test_token_files_go_without_their_text(whole: Path, tmp_path: Path) -> None:
    (folder,) = whole.iterdir()
    assert f"{folder} is ready" in prepare(f"data.corpus=[{folder}]", folder=tmp_path)
    assert not list(tmp_path.iterdir())
    assert "data.held_out=0.1" in prepare(f"data.corpus=[{folder}]", "data.held_out=0.1", folder=tmp_path, code=2)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.corpus=[nowhere]"], "data.corpus=nowhere: no such file"),
        (["data.corpus=[empty]"], "data.held_out=0.05 leaves train empty: 0 text files"),
        (["data.corpus=[one]"], "data.held_out=0.05 leaves held_out empty: 1 text files"),
        (["data.tokenizer=gone.json"], "data.tokenizer=gone.json: no such file"),
        (["data.folder=one/a.txt"], "data.folder=one/a.txt"),
        (["data.held_out=1"], "data.held_out=1.0 must lie between 0 and 1"),
        (["data.workers=0"], "data.workers=0 must be at least 1"),
        (["data.corpus=[]"], "data.corpus=() must name a text"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, overrides: list[str], said: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("a")
    assert said in prepare(*overrides, folder=tmp_path, code=2)


MEASURE = """
import resource, sys
from training.data.config import DataConfig
from training.data.prepare import prepare
prepare(DataConfig(sequence_length=128, corpus=("book.txt",), workers=1))
assert "torch" not in sys.modules
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print([int(peak) // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024])
"""


def test_a_text_larger_than_memory_would_do(tmp_path: Path) -> None:
    """120 MB of text pass through processes that never grow beyond 80. (They begin with 35 to 55.)"""
    with (tmp_path / "book.txt").open("w") as file:
        for i in range(120):
            file.write(LINE.format(i) * 10_300)
    run = subprocess.run([sys.executable, "-c", MEASURE], cwd=tmp_path, capture_output=True, text=True, check=True)
    own, workers = json.loads(run.stdout.splitlines()[-1])
    assert own < 80 and workers < 80, (own, workers)


def test_workers_load_no_torch() -> None:
    check = "import sys, training.data.worker; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
