"""Expert parallelism: every rank of an ep group holds its own experts, and tokens travel to them and back.

    tokens [T] -- a copy for each rank that a token has experts on -- all-to-all --> rows received, by rank and token
        -- laid out by expert (model/exchange.py), the experts, weighed and summed --> one row for each row received
        -- all-to-all back --> the copies of a token are summed

A token travels once to each rank, however many of its experts are there, and what they made of it comes back as one
row. Its choices there travel beside it: which experts, and their gates. All that moves rows is gathers, and so are
their gradients. No token is dropped: what a rank receives is as much as was sent, be it nothing. Within an expert, rows
keep the order of ranks and tokens.

Which rank holds an expert is a placement, one a layer: slot ``places[e]`` of E, of which every rank has E / n in a row.
Routing, gates, biases and loads speak of experts; only what travels speaks of slots.

Shapes: T tokens of this rank, K choices, E experts in all, n ranks, S rows sent, R rows received, C choices received.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.block import Block
from model.exchange import Arrived, Copies, Home, Layout, collect, lay_out, permute
from parallel.collectives import all_to_all
from parallel.locality import count, look
from parallel.mesh import Mesh, Traffic
from parallel.topology import Axis


class Splits(NamedTuple):
    """How many go to each rank, and come from each."""

    sent: list[int]
    received: list[int]


class Sending(NamedTuple):
    """What leaves this rank, sorted by the rank it goes to."""

    touched: Tensor  # [T, n] int64, 1 where a token has experts on a rank
    copies: Copies  # of this rank's tokens, among the rows sent
    counts: Tensor  # [n, 2] int64, rows and choices for each rank
    order: Tensor  # [T K] int64, the choices in the order in which they leave
    codes: Tensor  # [T K] int64, of each: its row among those for its rank, times the slots of a rank, plus its slot


class AllToAll(torch.autograd.Function):
    """Rows to the ranks they belong to; their gradients back."""

    @staticmethod
    def forward(ctx, rows: Tensor, splits: Splits, group):  # type: ignore[no-untyped-def]
        ctx.splits, ctx.group = splits, group
        return all_to_all(rows, splits.sent, splits.received, group).wait()

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        return all_to_all(g, ctx.splits.received, ctx.splits.sent, ctx.group).wait(), None, None


class ExpertExchange:
    """The exchange over an ep group: see ``model.exchange.Exchange``."""

    def __init__(self, experts: int, pad: int, mesh: Mesh) -> None:
        """``experts`` in all; ep divides them."""
        self.experts, self.pad, self.ranks = experts, pad, mesh.degree(Axis.ep)
        self.places = torch.arange(experts, device=mesh.device)  # [E] int64, the slot of every expert
        self._view = look(mesh.topology.group(mesh.rank, Axis.ep), mesh.rank, mesh.ranks_per_node, mesh.device)
        self._travelled = torch.zeros(4, dtype=torch.int64, device=mesh.device)
        self._tokens, self._counts = mesh.group(Axis.ep, Traffic.tokens), mesh.group(Axis.ep, Traffic.counts)

    def dispatch(self, tokens: Tensor, experts: Tensor, gates: Tensor) -> Arrived:
        sending = sort(self.places.index_select(0, experts.flatten()).view_as(experts), self.experts, self.ranks)
        self._travelled += count(sending.touched, self._view, tokens.shape[1] * tokens.element_size())
        even = [1] * self.ranks
        received = all_to_all(sending.counts, even, even, self._counts).wait()  # [n, 2]
        sizes = torch.stack((sending.counts, received)).permute(2, 0, 1).cpu()  # [2, 2, n]
        rows, choices = (Splits(*splits) for splits in sizes.tolist())
        codes = all_to_all(sending.codes, choices.sent, choices.received, self._counts).wait()
        layout = self._lay_out(codes, received, sum(rows.received))._replace(home=Home(sending.copies, sizes[0]))
        leaving = gates.flatten().index_select(0, sending.order)
        return Arrived(
            AllToAll.apply(permute(tokens, sending.copies), rows, self._tokens),
            AllToAll.apply(leaving, choices, self._counts),
            layout,
        )

    def combine(self, mixed: Tensor, layout: Layout) -> Tensor:
        home = layout.home
        assert home is not None
        sent, received = home.splits.tolist()
        return collect(AllToAll.apply(mixed, Splits(received, sent), self._tokens), home.copies)

    def take_travelled(self) -> Tensor:
        """What has been moved since this was last asked: [4], see ``parallel.locality.Travel``."""
        travelled, self._travelled = self._travelled, torch.zeros_like(self._travelled)
        return travelled

    def _lay_out(self, codes: Tensor, received: Tensor, rows: int) -> Layout:
        """``codes`` [C] of the choices received and counts [n, 2] from each rank, ``rows`` in all -> their layout."""
        local = self.experts // self.ranks
        first = (received[:, 0].cumsum(0) - received[:, 0]).repeat_interleave(received[:, 1], output_size=len(codes))
        return lay_out(codes % local, first + codes // local, rows, local, self.pad)


def sort(slots: Tensor, experts: int, ranks: int) -> Sending:
    """``slots`` [T, K] of tokens, of ``experts`` in all -> what goes to each of ``ranks``, in the order of tokens."""
    local = experts // ranks
    rank = slots // local  # [T, K]
    touched = torch.zeros(len(slots), ranks, dtype=torch.int64, device=slots.device).scatter_(1, rank, 1)
    by_rank = touched.t().flatten().cumsum(0).view(ranks, -1).t() - touched  # [T, n], where a token's copy is sent
    owners, where = touched.nonzero(as_tuple=True)
    slot = by_rank[owners, where]
    each = touched.sum(1)
    copies = Copies(torch.empty_like(slot).scatter_(0, slot, owners), slot, each.cumsum(0) - each)
    rows, flat = touched.sum(0), rank.flatten()
    choices = torch.zeros_like(rows).scatter_add_(0, flat, torch.ones_like(flat))
    order = flat.argsort(stable=True)
    codes = (by_rank.gather(1, rank) - (rows.cumsum(0) - rows)[rank]) * local + slots % local
    return Sending(touched, copies, torch.stack((rows, choices), 1), order, codes.flatten().index_select(0, order))


def find_exchanges(models: Iterable[nn.Module]) -> dict[str, ExpertExchange]:
    """The exchange of every block whose experts are spread over ranks, by name, stage by stage.

    Within a stage they are in the order of ``Transformer.rows``.
    """
    return {
        name: block.exchange
        for model in models
        for name, block in model.named_modules()
        if isinstance(block, Block) and isinstance(block.exchange, ExpertExchange)
    }


def take_travelled(models: Iterable[nn.Module], mesh: Mesh) -> Tensor:
    """What has been moved since this was last asked, over all layers of this rank: see ``ExpertExchange``."""
    none = torch.zeros(4, dtype=torch.int64, device=mesh.device)
    return sum((exchange.take_travelled() for exchange in find_exchanges(models).values()), none)
