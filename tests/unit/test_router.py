"""The router: which experts, with what gates, at what auxiliary loss, and how the bias balances."""

from typing import Any

import pytest
import torch
from small_models import SOFTMAX, check_gradients, make_config
from torch import Tensor

from model.config import MoEConfig, ScoreFunction
from model.router import Router, choose

HIDDEN, TOKENS = 12, 40


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_router(**moe: Any) -> Router:
    router = Router(make_config(moe=moe)).double()
    with torch.no_grad():
        router.weight.copy_(random(*router.weight.shape, seed=1))
        router.bias.zero_()
    return router


def moe(experts: int, groups: int, top_groups: int, top_k: int, score: str = "sigmoid") -> MoEConfig:
    return MoEConfig(
        experts=experts, ffn=1, groups=groups, top_groups=top_groups, top_k=top_k, score=ScoreFunction(score)
    )


@pytest.mark.parametrize("score", ScoreFunction)
@pytest.mark.parametrize(("groups", "top_groups", "top_k"), [(4, 2, 4), (4, 1, 3), (2, 1, 2), (12, 5, 5), (1, 1, 6)])
def test_choices_are_the_best_within_few_groups(groups: int, top_groups: int, top_k: int, score: str) -> None:
    config = moe(12, groups, top_groups, top_k, score)
    scores = random(TOKENS, 12)
    chosen = choose(scores, config)
    size = 12 // groups
    for token, experts in zip(scores.tolist(), chosen.tolist(), strict=True):
        assert len(set(experts)) == top_k
        assert len({e // size for e in experts}) <= top_groups
        best = [sorted(token[g * size : (g + 1) * size], reverse=True) for g in range(groups)]
        ranks = [sum(b[:2]) if score == "sigmoid" else b[0] for b in best]
        opened = sorted(range(groups), key=lambda g: ranks[g], reverse=True)[:top_groups]
        allowed = [e for e in range(12) if e // size in opened]
        assert set(experts) == set(sorted(allowed, key=lambda e: token[e], reverse=True)[:top_k])


def test_a_group_is_ranked_by_its_two_best_experts_in_v3_and_by_its_best_in_v2() -> None:
    #                       group 0: one star      group 1: two good ones
    scores = torch.tensor([[0.9, 0.1, 0.0, 0.0, 0.6, 0.5, 0.0, 0.0]])
    assert choose(scores, moe(8, 2, 1, 2)).tolist() == [[4, 5]]
    assert choose(scores, moe(8, 2, 1, 2, "softmax")).tolist() == [[0, 1]]


def test_the_bias_chooses_and_the_unbiased_scores_are_the_gates() -> None:
    router = make_router(groups=1, top_groups=1)
    x = random(2, 20, HIDDEN)
    with torch.no_grad():
        router.bias[3] = 10.0
    routing = router(x)
    assert (routing.experts == 3).any(-1).all()
    scores = torch.sigmoid(x.flatten(0, 1) @ router.weight.t()).gather(-1, routing.experts)
    torch.testing.assert_close(routing.gates, 2.5 * scores / scores.sum(-1, keepdim=True), atol=1e-14, rtol=0)
    torch.testing.assert_close(routing.gates.sum(-1), torch.full((TOKENS,), 2.5, dtype=torch.float64))


def test_gates_of_v2_are_softmax_scores_as_they_are() -> None:
    router = make_router(**SOFTMAX)
    x = random(2, 20, HIDDEN)
    routing = router(x)
    scores = (x.flatten(0, 1) @ router.weight.t()).softmax(-1)
    torch.testing.assert_close(routing.gates, scores.gather(-1, routing.experts), atol=1e-14, rtol=0)


def test_the_bias_gets_no_gradient_and_the_weight_gets_the_gates() -> None:
    router = make_router()
    x = random(1, 8, HIDDEN).requires_grad_()
    fixed = router(x).experts

    def gates_and_aux(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        routing = torch.func.functional_call(router, {"weight": weight}, (x,))
        assert torch.equal(routing.experts, fixed)
        return routing.gates, routing.aux

    assert check_gradients(gates_and_aux, (x, router.weight))
    assert not router.bias.requires_grad and "bias" in dict(router.named_buffers())


@pytest.mark.parametrize("kind", [{}, SOFTMAX])
def test_the_auxiliary_loss_is_the_papers_sequence_by_sequence(kind: dict[str, Any]) -> None:
    router = make_router(**kind)
    x = random(3, 7, HIDDEN)
    routing = router(x)
    expected = torch.zeros((), dtype=torch.float64)
    for sequence, experts in zip(x, routing.experts.view(3, 7, -1), strict=True):
        logits = sequence @ router.weight.t()
        scores = logits.softmax(-1) if kind else logits.sigmoid()
        for i in range(6):
            frequency = 6 / (2 * 7) * int((experts == i).sum())
            expected += frequency * (scores[:, i] / scores.sum(-1)).mean()
    torch.testing.assert_close(routing.aux, expected, atol=1e-13, rtol=0)
    assert routing.load.tolist() == [int((routing.experts == i).sum()) for i in range(6)]


def test_the_auxiliary_loss_does_not_depend_on_the_micro_batch() -> None:
    router, x = make_router(), random(4, 5, HIDDEN)
    pieces = [router(part).aux for part in x.split([1, 3])]
    torch.testing.assert_close(sum(pieces), router(x).aux, atol=1e-13, rtol=0)


def test_an_even_load_has_the_smallest_auxiliary_loss_and_one_expert_the_largest() -> None:
    # With all shares even, sum_i f_i P_i = sum_i f_i / E = 1 whatever was chosen; concentration raises it.
    router = make_router(groups=1, top_groups=1, top_k=1)
    with torch.no_grad():
        router.weight.zero_()
    assert float(router(random(1, 9, HIDDEN)).aux.detach()) == pytest.approx(1.0)
    with torch.no_grad():
        router.weight[2] = 100.0
        router.weight[[0, 1, 3, 4, 5]] = -100.0
    assert float(router(random(1, 9, HIDDEN).abs()).aux.detach()) == pytest.approx(6.0)


def test_a_bias_moves_by_its_speed_against_the_load_error() -> None:
    router = make_router()
    router.update_bias(torch.tensor([5, 3, 2, 1, 4, 3]), 0.001)
    assert router.bias.tolist() == [-0.001, 0.0, 0.001, 0.001, -0.001, 0.0]
    router.update_bias(torch.tensor([2**40 + 1, *[2**40] * 5]), 0.001)  # an error far below float32's resolution
    assert router.bias.tolist() == [-0.002, *(b + 0.001 for b in [0.0, 0.001, 0.001, -0.001, 0.0])]


def test_updates_balance_a_router() -> None:
    router = make_router()
    with torch.no_grad():
        router.weight[0] += 2.0  # with positive inputs, everybody's favourite
    x = random(8, 64, HIDDEN).abs()
    first = router(x).load
    for _ in range(300):
        router.update_bias(router(x).load, 0.01)
    last = router(x).load
    mean = 8 * 64 * 2 / 6
    assert first.max() / mean - 1 > 1.0
    assert last.max() / mean - 1 < 0.2


def test_scores_are_float32_in_a_bfloat16_model() -> None:
    router = Router(make_config()).float()
    with torch.no_grad():
        router.weight.copy_(random(*router.weight.shape))
        router.bias.zero_()
    x = random(1, 8, HIDDEN).bfloat16()
    routing = router(x)
    assert routing.gates.dtype == routing.aux.dtype == torch.float32
    assert torch.equal(routing.gates, router(x.float()).gates)
