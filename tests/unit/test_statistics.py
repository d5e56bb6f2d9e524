"""Load statistics: violation and dead experts from counts of tokens per expert and layer."""

import torch

from model.statistics import measure_balance


def test_violation_is_the_largest_load_over_the_mean():
    balance = measure_balance(torch.tensor([[4, 4, 4, 4], [7, 5, 3, 1], [16, 0, 0, 0]]))
    assert balance.max_violation.tolist() == [0.0, 0.75, 3.0]
    assert balance.dead.tolist() == [0, 0, 3]
    assert balance.worst_violation() == 3.0
    assert balance.dead_experts() == 3


def test_a_layer_without_tokens_is_even_and_has_no_dead_experts():
    balance = measure_balance(torch.tensor([[0, 0, 0], [2, 1, 0]]))
    assert balance.max_violation.tolist() == [0.0, 1.0]
    assert balance.dead.tolist() == [0, 1]


def test_a_dense_model_has_no_layers():
    balance = measure_balance(torch.zeros(0, 0, dtype=torch.int64))
    assert balance.max_violation.tolist() == []
    assert balance.worst_violation() == 0.0
    assert balance.dead_experts() == 0


def test_counts_beyond_float32_are_exact():
    # One token too many among 2^40: lost in float32.
    load = torch.tensor([[2**40 + 1, 2**40 - 1]])
    assert measure_balance(load).worst_violation() == 2.0**-40
