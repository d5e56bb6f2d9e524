"""One step: global denominators, gradient accumulation, skipped and abandoned steps, router biases."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import make_config
from small_runs import WORDS, make_run, open_run
from torch import Tensor

from model.batch import count_labels
from training.config import Precision
from training.microbatches import count_denominators
from training.setup import Setup
from training.step import run_step


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short documents, so that masking between them leaves micro-batches with unequal numbers of labels."""
    folder = tmp_path_factory.mktemp("pages")
    for number in range(16):
        words = [WORDS[(5 * i + number) % len(WORDS)] for i in range(1 + 3 * (number % 4))]
        (folder / f"page{number:02}.txt").write_text(" ".join(words))
    return folder


def open_pages(folder: Path, micro_batch: int, **run: Any) -> Setup:
    corpus = tuple(str(path) for path in sorted(folder.glob("*.txt")))
    config = make_run(
        folder,
        model=make_config(vocab_size=264, mtp=2),
        data={"corpus": corpus, "mask_documents": True},
        optimizer={"clip": 0.0},
        precision=Precision.fp64,
        micro_batch=micro_batch,
        **run,
    )
    return open_run(config)


def state(setup: Setup) -> dict[str, Tensor]:
    return {chunk.name: chunk.tensor for chunk in setup.engine.state().chunks}


def gradients(setup: Setup) -> dict[str, Tensor]:
    """What a first step's gradients were: the first moments are (1 - beta1) times them."""
    return {name: tensor / 0.1 for name, tensor in state(setup).items() if name.startswith("m/")}


def test_every_split_into_micro_batches_gives_the_same_gradients(pages: Path) -> None:
    whole = open_pages(pages, micro_batch=8)
    reference = run_step(whole, 0, never)
    assert reference is not None
    counts = [count_labels(whole.text.train.read(first, 1), 2)[0] for first in range(8)]
    assert len(set(counts)) > 2, "a mean of means would go unnoticed"
    for micro_batch in (1, 2, 4):
        split = open_pages(pages, micro_batch=micro_batch)
        row = run_step(split, 0, never)
        assert row is not None
        assert row.loss == pytest.approx(reference.loss, rel=1e-13)
        assert row.mtp_losses == pytest.approx(reference.mtp_losses, rel=1e-13)
        assert row.aux == pytest.approx(reference.aux, rel=1e-12)
        assert row.grad_norm == pytest.approx(reference.grad_norm, rel=1e-12)
        assert row.violation_worst == reference.violation_worst
        for name, grad in gradients(split).items():
            expected = gradients(whole)[name]
            assert (grad - expected).abs().max() <= 1e-12 * expected.abs().max().clamp(min=1e-3), name
        for ours, theirs in zip(split.stages[0].routers(), whole.stages[0].routers(), strict=True):
            assert torch.equal(ours.bias, theirs.bias) and ours.bias.abs().max() > 0


def test_the_loss_is_the_sum_over_the_number_of_labels(pages: Path) -> None:
    setup = open_pages(pages, micro_batch=2)
    batches = [setup.text.train.read(first, 2) for first in range(0, 8, 2)]
    denominators = count_denominators(batches, 2, setup.mesh)
    expected = [sum(int(batch.counted[:, 1 + d : 17 + d].sum()) for batch in batches) for d in range(3)]
    assert denominators.tokens == tuple(map(float, expected)) and denominators.sequences == 8.0
    setup.engine.begin()
    totals = setup.runner.step(setup.engine, batches, denominators, never)
    assert totals is not None
    row = run_step(setup, 0, never)
    assert row is not None and row.loss == pytest.approx(totals.losses[0].item() / expected[0], rel=1e-13)


def test_loads_are_those_of_the_whole_batch(pages: Path) -> None:
    """Each token counts once for each of its experts, in every routed layer; and only where the record shows it."""
    setup = open_pages(pages, micro_batch=2, steps=500)
    model, shown, quiet = setup.config.model, run_step(setup, 0, never), run_step(setup, 1, never)
    assert shown is not None and quiet is not None and quiet.load == ()
    assert [len(layer) for layer in shown.load] == [model.moe.experts] * len(model.routed_blocks())
    assert {sum(layer) for layer in shown.load[: -model.mtp.depth]} == {shown.tokens * model.moe.top_k}
    assert max(max(layer) / sum(layer) * len(layer) - 1 for layer in shown.load) == shown.violation_worst
    assert sum(layer.count(0) for layer in shown.load) == shown.dead_experts


def test_micro_batches_without_labels_are_no_division_by_zero(pages: Path) -> None:
    setup = open_pages(pages, micro_batch=2)
    batch = setup.text.train.read(0, 2)
    empty = batch._replace(counted=torch.zeros_like(batch.counted))
    assert count_denominators([empty], 2, setup.mesh).tokens == (1.0, 1.0, 1.0)


def test_an_abandoned_step_leaves_no_trace(text: Path) -> None:
    disturbed, quiet = (open_run(make_run(text)) for _ in range(2))
    answers = iter([False, True])
    before = [parameter.clone() for parameter in disturbed.stages[0].parameters()]
    assert run_step(disturbed, 0, stop=lambda: next(answers)) is None
    assert all(torch.equal(a, b) for a, b in zip(before, disturbed.stages[0].parameters(), strict=True))
    for step in range(2):
        first, second = run_step(disturbed, step, never), run_step(quiet, step, never)
        assert first is not None and second is not None
        assert (first.loss, first.grad_norm) == (second.loss, second.grad_norm)
    pairs = zip(disturbed.stages[0].parameters(), quiet.stages[0].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_step_that_is_not_finite_is_skipped(text: Path) -> None:
    setup = open_run(make_run(text))
    with torch.no_grad():
        kept = setup.stages[0].head.weight[3].clone()
        setup.stages[0].head.weight[3] = float("nan")
    before = {name: tensor.clone() for name, tensor in state(setup).items()}
    row = run_step(setup, 0, never)
    assert row is not None and row.skipped and row.loss != row.loss
    assert all(torch.equal(t, before[n]) or t.isnan().any() for n, t in state(setup).items())
    assert all(not router.bias.any() for router in setup.stages[0].routers())
    with torch.no_grad():
        setup.stages[0].head.weight[3] = kept
    row = run_step(setup, 1, never)
    assert row is not None and not row.skipped and row.cursor == 16
    assert all(router.bias.any() for router in setup.stages[0].routers())
