"""Expert parallelism: every rank of an ep group holds its own experts, and tokens travel to them and back.

    choices [T, K] -- sort by expert --> rows sent, by rank -- all-to-all --> rows received, by rank and expert
        -- lay out --> runs of one expert each (model/exchange.py), the experts, and the same way back

Both sorts are gathers, and so are their gradients. No token is dropped: what a rank receives is as much as was sent, be
it nothing. Within an expert, rows keep the order of ranks and tokens.

Which rank holds an expert is a placement, one a layer: slot ``places[e]`` of E, of which every rank has E / n in a row.
Routing, gates, biases and loads speak of experts; only what travels speaks of slots.

Shapes: T tokens of this rank, K choices, E experts in all, n ranks, R rows received, P slots for rows.
"""

import torch
from torch import Tensor, nn

from model.block import Block
from model.exchange import Home, Layout, Permute, lay_out
from parallel.collectives import all_to_all
from parallel.mesh import Mesh, Traffic
from parallel.topology import Axis


class AllToAll(torch.autograd.Function):
    """Rows to the ranks they belong to; their gradients back."""

    @staticmethod
    def forward(ctx, rows: Tensor, sent: Tensor, received: Tensor, group):  # type: ignore[no-untyped-def]
        ctx.sent, ctx.received, ctx.group = sent.tolist(), received.tolist(), group
        return all_to_all(rows, ctx.sent, ctx.received, group).wait()

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        return all_to_all(g, ctx.received, ctx.sent, ctx.group).wait(), None, None, None


class Collect(torch.autograd.Function):
    """out[r] = rows[slots[r]]; slots that hold no row get no gradient."""

    @staticmethod
    def forward(ctx, rows: Tensor, source: Tensor, slots: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(source, slots)
        return rows.index_select(0, slots)

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        source, slots = ctx.saved_tensors
        held = g.new_zeros(len(source), 1).index_fill_(0, slots, 1)
        # Without any row there is none for the padding to read.
        return g.index_select(0, source).mul_(held) if len(g) else g.new_zeros(len(source), g.shape[1]), None, None


class ExpertExchange:
    """The exchange over an ep group: see ``model.exchange.Exchange``."""

    def __init__(self, experts: int, pad: int, mesh: Mesh) -> None:
        """``experts`` in all; ep divides them."""
        self.experts, self.pad, self.ranks = experts, pad, mesh.degree(Axis.ep)
        self.places = torch.arange(experts, device=mesh.device)  # [E] int64, the slot of every expert
        self._tokens, self._counts = mesh.group(Axis.ep, Traffic.tokens), mesh.group(Axis.ep, Traffic.counts)

    def dispatch(self, tokens: Tensor, experts: Tensor) -> tuple[Tensor, Layout]:
        flat = self.places.index_select(0, experts.flatten())
        order = flat.argsort(stable=True)  # slots of one rank are neighbours: sorted by slot is sorted by rank
        here = torch.zeros(self.experts, dtype=torch.int64, device=flat.device)
        here = here.scatter_add_(0, flat, torch.ones_like(flat)).view(self.ranks, -1)
        even = [1] * self.ranks
        there = all_to_all(here, even, even, self._counts).wait()  # [n, E / n]: from each rank, for each slot here
        home = Home(
            sent=here.sum(1),
            received=there.sum(1),
            source=order // experts.shape[1],
            slots=torch.empty_like(flat).scatter_(0, order, torch.arange(len(flat), device=flat.device)),
        )
        home = home._replace(slots=home.slots.view_as(experts))
        rows = Permute.apply(tokens, home.source, home.slots)
        received = AllToAll.apply(rows, home.sent, home.received, self._tokens)
        local = torch.arange(there.shape[1], device=flat.device).repeat(self.ranks)
        layout = lay_out(local.repeat_interleave(there.flatten())[:, None], there.shape[1], self.pad)
        return received, layout._replace(home=home)

    def combine(self, rows: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        home = layout.home
        assert home is not None
        done = Collect.apply(rows, layout.source, layout.slots[:, 0])
        returned = AllToAll.apply(done, home.received, home.sent, self._tokens)
        return returned, Layout(home.source, home.slots, layout.ends)


def find_exchanges(model: nn.Module) -> dict[str, ExpertExchange]:
    """The exchange of every block whose experts are spread over ranks, by name, in the order of ``Losses.load``."""
    return {
        name: block.exchange
        for name, block in model.named_modules()
        if isinstance(block, Block) and isinstance(block.exchange, ExpertExchange)
    }
