"""A whole run in this process: the same bits twice, evaluation, endings, what is left on disk."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import make_config
from small_runs import make_run, open_run

from model.huggingface import export
from training import ledger, loop
from training.config import Device, MomentDtype, Precision, RampConfig
from training.data.tokenizer import load_tokenizer
from training.evaluate import count_sequences, evaluate
from training.finish import Ending
from training.interrupt import Interrupt
from training.loop import train
from training.metrics import read
from training.restore import restore
from training.save import open_saved
from training.setup import Setup


def losses(text: Path, path: Path, **changes: Any) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of a run in the folder ``path``."""
    path.mkdir()
    train(make_run(text, **changes), path)
    return [(row["loss"], row["grad_norm"]) for row in read(path / "metrics.jsonl", "step")]


@pytest.mark.parametrize(
    "precision",
    [
        *(each for each in Precision if each is not Precision.mxfp8),
        pytest.param(Precision.mxfp8, marks=pytest.mark.full),
    ],
)
def test_the_same_seed_gives_the_same_bits(text: Path, tmp_path: Path, precision: Precision) -> None:
    first, second = (losses(text, tmp_path / name, precision=precision) for name in ("first", "second"))
    assert len(first) == 6 and first == second
    assert losses(text, tmp_path / "other", precision=precision, seed=1) != first
    weights = [
        (tmp_path / name / "weights" / "00001.safetensors").read_bytes() for name in ("first", "second", "other")
    ]
    assert weights[0] == weights[1] != weights[2]


def test_threads_are_those_of_the_configuration(text: Path, tmp_path: Path) -> None:
    reference = losses(text, tmp_path / "one", threads=1)
    torch.set_num_threads(2)
    assert losses(text, tmp_path / "again", threads=1) == reference
    assert torch.get_num_threads() == 1
    start = json.loads((tmp_path / "again" / "metrics.jsonl").read_text().splitlines()[0])
    assert start["kind"] == "start" and start["threads"] == 1 and start["device"] == "cpu"


def test_a_run_learns_and_leaves_its_things(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_run(text, steps=40, eval_every=20, optimizer={"moments": MomentDtype.bf16})
    summary = train(config, tmp_path, price=1000.0)
    rows = read(tmp_path / "metrics.jsonl", "step")
    assert summary.ending is Ending.finished and summary.steps == len(rows) == 40
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"] and rows[-1]["loss"] == summary.loss
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl", "eval")] == [19, 39]
    assert read(tmp_path / "metrics.jsonl", "eval")[-1]["loss"] == summary.held_out < math.log(264)
    assert rows[-1]["cursor"] == 320 and rows[-1]["peak_memory"] > 1 << 20
    (end,) = read(tmp_path / "metrics.jsonl", "end")
    assert end["ending"] == "finished" and end["cost"] >= end["seconds"] / 3.6 > 0
    (attempt,) = ledger.read(tmp_path)
    assert attempt.ending == "finished" and end["cost"] == pytest.approx((attempt.end - attempt.begin) / 3.6e9)
    assert sum(attempt.parts.values()) == attempt.end - attempt.begin and min(attempt.parts.values()) >= 0
    assert attempt.parts["useful"] > attempt.parts["evaluation"] > 0 == attempt.parts["recomputed"]
    sample = (tmp_path / "sample.txt").read_text()
    assert sample.startswith("the ") and len(sample) > 4
    shown = capsys.readouterr().out
    assert f"held-out loss {summary.held_out:.4f} nats a token   (a bigram model: {summary.bigram:.4f})" in shown
    assert all(str(tmp_path / name) in shown for name in ("weights", "metrics.jsonl", "sample.txt"))


def test_weights_load_bit_for_bit(text: Path, tmp_path: Path) -> None:
    config = make_run(text, precision=Precision.bf16)
    setup_seen: list[Setup] = []
    original = loop.set_up
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "set_up", lambda *a, **k: setup_seen.append(original(*a, **k)) or setup_seen[0])
        train(config, tmp_path)
    trained = setup_seen[0].stages[0].state_dict()
    model, tokenizer = restore(config, tmp_path / "weights", Device.cpu, threads=1)
    assert tokenizer.name == load_tokenizer("bytes").name
    assert trained.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    assert any(router.bias.any() for router in model.routers())


def test_held_out_loss_is_the_mean_over_its_labels(text: Path) -> None:
    config = make_run(text, precision=Precision.fp64, data={"mask_documents": False}, model=make_config(vocab_size=264))
    setup = open_run(config)
    count = count_sequences(setup.text.held_out, setup.config.run.eval_tokens)
    batch = setup.text.held_out.read(0, count)
    assert count == 16  # 256 tokens
    logits = setup.stages[0].logits(batch.ids[:, :-1])
    right = logits.log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    expected = -right[batch.counted[:, 1:]].mean()
    assert evaluate(setup) == pytest.approx(expected.item(), rel=1e-12)


def test_evaluation_reads_no_sequence_twice(text: Path) -> None:
    held_out = open_run(make_run(text, eval_tokens=1 << 20)).text.held_out
    assert held_out.sequences - 4 < count_sequences(held_out, 1 << 20) <= held_out.sequences


def test_stays_infinite_for_too_long(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"lr": 1e30, "clip": 0.0, "skip_limit": 2}
    summary = train(make_run(text, steps=50, optimizer=changes), tmp_path)
    rows = read(tmp_path / "metrics.jsonl", "step")
    assert summary.ending is Ending.diverged
    assert [row["skipped"] for row in rows][-4:] == [False, True, True, True] and len(rows) < 50
    assert rows[-1]["loss"] is None or rows[-1]["grad_norm"] is None
    assert "optimizer.skip_limit=2" in capsys.readouterr().out
    assert (tmp_path / "weights" / "manifest.json").exists() and not (tmp_path / "sample.txt").exists()


def test_the_batch_ramp_moves_the_cursor(text: Path, tmp_path: Path) -> None:
    train(make_run(text, ramp=RampConfig(start=4, tokens=200)), tmp_path)
    rows = read(tmp_path / "metrics.jsonl", "step")
    assert [row["tokens"] // 16 for row in rows] == [4, 4, 4, 4, 8, 8]
    assert [row["cursor"] for row in rows] == [4, 8, 12, 16, 24, 32]


def test_nothing_is_saved_when_not_wanted(text: Path, tmp_path: Path) -> None:
    config = make_run(text, steps=1)
    config.checkpoint.save = False
    config.run.sample.tokens = 0
    train(config, tmp_path)
    left = {file.name for file in tmp_path.iterdir()} - {"logs"}  # which a run this short may have none of
    assert left == {"ledger.jsonl", "metrics.jsonl"}


def test_the_first_interrupt_asks_and_the_second_stops() -> None:
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupt(said.append) as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked and "again stops at once" in said[0]
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_request_behind_the_loop_ends_no_rank() -> None:
    """Also where a thread takes it that was started in the loop: it does not block the signal, as the main one does."""
    code = """
import os, signal, threading, time
from launcher.entry import keep_requests
from training.interrupt import LAUNCHER, Interrupt

keep_requests()
with Interrupt(print) as interrupt:
    threading.Thread(target=time.sleep, args=(0.5,)).start()
os.kill(os.getpid(), LAUNCHER)
print("goes on", interrupt.asked)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout) == (0, "goes on False\n"), done.stderr


def test_starts_from_published_weights(text: Path, tmp_path: Path) -> None:
    """What a run saved, exported and loaded by ``init_from``, is what the next run starts with."""
    config = make_run(text, precision=Precision.fp32)
    train(config, tmp_path)
    export(open_saved(tmp_path / "weights"), config.model, tmp_path / "published", 10**9, 256)
    config.init_from = str(tmp_path / "published")
    started = open_run(config)
    trained, _ = restore(config, tmp_path / "weights", Device.cpu, threads=1)
    names = [name for name, _ in trained.named_parameters() if not name.startswith("mtp")]
    ours, theirs = dict(started.stages[0].named_parameters()), dict(trained.named_parameters())
    assert len(names) > 20 and all(torch.equal(ours[name], theirs[name]) for name in names)
    (end,) = read(tmp_path / "metrics.jsonl", "end")
    assert evaluate(started) == pytest.approx(end["held_out"], rel=1e-6)


def test_seeds_are_measured_on_the_same_labels(text: Path) -> None:
    first, second = (open_run(make_run(text, data={"seed": seed})).text for seed in (0, 1))
    assert torch.equal(first.held_out.read(0, 8).ids, second.held_out.read(0, 8).ids)
    assert not torch.equal(first.train.read(0, 8).ids, second.train.read(0, 8).ids)
