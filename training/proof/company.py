"""Which tokens go through an expert together: the one thing about numbers in FP8 that a layout decides.

A weight gradient in FP8 has a scale for every 128 tokens of its sum. In a dense layer these are tokens that follow one
another, in any layout. At an expert they are those that one micro-batch of an ep group's ranks sends there, rank by
rank. ``Together`` is the plain model's exchange, with each such company laid out by itself, in tiles of its own.

Shapes: N sequences of a step, S tokens each, A = N * S tokens, G companies, K choices, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.block import Block
from model.exchange import LocalExchange, Shipped, lay_out
from model.transformer import Transformer
from parallel.placement import span
from parallel.topology import Axis
from training.proof.case import Case, place_sequences


class Companies(NamedTuple):
    """The tokens of a global batch, as layouts read them."""

    order: Tensor  # [A] int64: company by company, in each rank by rank, the token's place in the batch
    numbers: Tensor  # [A] int64: its company
    total: int  # G


def find_companies(case: Case) -> Companies:
    """Of a case's batches."""
    topology, pieces = case.topology, case.overlap.pieces
    tokens = torch.arange(case.sequences * case.length).view(case.sequences, case.length)
    parts: dict[tuple[int, int, int], list[Tensor]] = {}  # by ep group, micro-batch and piece
    for rank in range(topology.stage_size):
        here = span(case.length, topology.degree(Axis.sequence), topology.coordinate(rank, Axis.sequence))
        group = topology.group(rank, Axis.ep)[0]
        for microbatch, place in enumerate(place_sequences(case, topology.coordinate(rank, Axis.dp), 0)):
            read = tokens[place, here.start : here.stop].flatten()
            for piece, part in enumerate(read.tensor_split(pieces)):
                parts.setdefault((group, microbatch, piece), []).append(part)
    together = [torch.cat(company) for company in parts.values()]
    numbers = torch.arange(len(together)).repeat_interleave(torch.tensor([len(company) for company in together]))
    return Companies(torch.cat(together), numbers, len(together))


def join_companies(case: Case, model: Transformer) -> None:
    """Has tokens of the plain ``model`` go through experts in the companies that they have in the case's layout."""
    assert case.recipe is not None
    companies = find_companies(case)
    for block in model.modules():
        if isinstance(block, Block) and block.exchange is not None:
            block.exchange = Together(case.model.moe.experts, case.recipe.activations.tile[1], companies)


class Together(LocalExchange):
    """``LocalExchange`` of global batches, each company's rows of an expert in tiles of ``tile`` of their own."""

    def __init__(self, experts: int, tile: int, companies: Companies) -> None:
        super().__init__(experts, tile)
        self._companies = companies

    def dispatch(self, tokens: Tensor, gates: Tensor, announced: Tensor) -> tuple[Shipped, ...]:
        order, numbers, total = self._companies
        tokens, gates, experts = (each.index_select(0, order) for each in (tokens, gates, announced))
        runs = experts * total + numbers[:, None]
        owners = torch.arange(len(order)).repeat_interleave(experts.shape[1])
        layout = lay_out(runs.flatten(), owners, len(order), self.experts * total, self.pad)
        return (Shipped((tokens, gates.flatten()), layout._replace(ends=layout.ends[total - 1 :: total])),)

    def collect(self, shipped: Shipped) -> Tensor:
        return super().collect(shipped).index_select(0, self._companies.order.argsort())
