"""Expert parallelism: every rank of an ep group holds its own experts, and tokens travel to them and back.

    tokens [T] -- a copy for each rank that a token has experts on -- all-to-all --> rows received, by rank and token
        -- laid out by expert (model/exchange.py), the experts, weighed and summed --> one row for each row received
        -- all-to-all back --> the copies of a token are summed

A token travels once to each rank, however many of its experts are there, and what they made of it comes back as one
row. With it, in the same message, go its choices and their gates: all of them, of which the rank takes its own. All
that moves rows is gathers, and so are their gradients. No token is dropped: what a rank receives is as much as was
sent, be it nothing. Within an expert, rows keep the order of ranks and tokens.

Which rank holds an expert is a placement, one a layer: slot ``places[e]`` of E, of which every rank has E / n in a row.
Routing, gates, biases and loads speak of experts; only what travels speaks of slots.

Shapes: T tokens of this rank, K choices, E experts in all, n ranks, S rows sent, R rows received.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.block import Block
from model.exchange import Arrived, Copies, Home, Layout, Shipped, collect, lay_out, sum_copies
from parallel.collectives import all_to_all, all_to_all_joined
from parallel.doing import doing
from parallel.locality import count, look
from parallel.mesh import Mesh, Traffic
from parallel.overlap.flight import Tensors, arrive, depart
from parallel.pending import Pending
from parallel.topology import Axis
from parallel.wire import Wanted, Wire, choose_wire


class Way(NamedTuple):
    """How many rows go to each rank of a group, and come from each."""

    sent: list[int]
    received: list[int]
    group: dist.ProcessGroup

    def back(self) -> "Way":
        """The other way round."""
        return Way(self.received, self.sent, self.group)


class Sending(NamedTuple):
    """What leaves this rank."""

    touched: Tensor  # [n, T] int64, 1 where a token has experts on a rank
    counts: Tensor  # [n, 2] int64, rows and choices for each rank


class Announced(NamedTuple):
    """Tokens before they leave, while ranks tell each other how many rows there will be."""

    slots: tuple[Tensor, ...]  # of every piece, [T, K] int64
    sendings: tuple[Sending, ...]
    counts: Pending[Tensor]  # [n, 2 pieces], rows and choices from each rank, piece by piece


class ToExperts(NamedTuple):
    """The route of tokens [T, H] with gates and slots [T, K] and what the wire takes for the tokens: copies to ranks,
    gradients back and summed.
    """

    copies: Copies
    way: Way
    wire: Wire

    def there(self, *tensors: Tensor) -> Pending[Tensors]:
        """See ``parallel.overlap.flight.Route``."""
        tokens, gates, slots, *packed = tensors
        sent = all_to_all_joined((gates, slots, *packed), self.copies.source, *self.way)
        return sent.then(lambda parts: (self.wire.unpack(parts[2:], tokens.dtype), *parts[:2]))

    def back(self, *gradients: Tensor) -> Pending[Tensors]:
        """See ``parallel.overlap.flight.Route``."""
        _, slots, starts = self.copies
        returned = all_to_all_joined(gradients[:2], None, *self.way.back())
        return returned.then(lambda parts: tuple(sum_copies(part, slots, starts) for part in parts))


class FromExperts(NamedTuple):
    """The route of rows to the ranks that their tokens came from; of their gradients back."""

    way: Way
    wire: Wire

    def there(self, *tensors: Tensor) -> Pending[Tensors]:
        """See ``parallel.overlap.flight.Route``."""
        (rows,) = tensors
        return all_to_all(rows, *self.way).then(lambda rows: (rows,))

    def back(self, *gradients: Tensor) -> Pending[Tensors]:
        """See ``parallel.overlap.flight.Route``."""
        (rows,) = gradients
        sent = all_to_all_joined(self.wire.pack(rows), None, *self.way.back())
        return sent.then(lambda parts: (self.wire.unpack(parts, rows.dtype),))


class ExpertExchange:
    """The exchange over an ep group: see ``model.exchange.Exchange``."""

    def __init__(self, experts: int, pad: int, mesh: Mesh, pieces: int = 1, wanted: Wanted = (None, None)) -> None:
        """``experts`` in all; ep divides them. Tokens go in so many ``pieces``, each by itself, quantised as they are
        ``wanted``: see ``model.experts.Experts``.
        """
        self.experts, self.pad, self.ranks, self.pieces = experts, pad, mesh.degree(Axis.ep), pieces
        self.places = torch.arange(experts, device=mesh.device)  # [E] int64, the slot of every expert
        self._view = look(mesh.topology.group(mesh.rank, Axis.ep), mesh.rank, mesh.ranks_per_node, mesh.device)
        self.lanes, self._there, self._back = mesh.lanes, *map(choose_wire, wanted)
        self._travelled = torch.zeros(4, dtype=torch.int64, device=mesh.device)
        self._tokens, self._counts = mesh.group(Axis.ep, Traffic.tokens), mesh.group(Axis.ep, Traffic.counts)

    def announce(self, experts: Tensor) -> Announced:
        slots = self.places.index_select(0, experts.flatten()).view_as(experts).tensor_split(self.pieces)
        sendings = tuple(address(piece, self.experts, self.ranks) for piece in slots)
        even, counts = [1] * self.ranks, torch.cat([sending.counts for sending in sendings], 1)
        pending = self.lanes.start(lambda x: all_to_all(x, even, even, self._counts), counts)
        return Announced(slots, sendings, pending)

    @doing("counts of tokens")
    def dispatch(self, tokens: Tensor, gates: Tensor, announced: Announced) -> tuple[Shipped, ...]:
        with torch.no_grad():
            packed = self._there.pack(tokens)
        row_bytes = sum(part.shape[1] * part.element_size() for part in packed)
        for sending in announced.sendings:
            self._travelled += count(sending.touched, self._view, row_bytes)
        self.lanes.idle(1)  # they are soon there
        there = announced.counts.wait().unflatten(1, (self.pieces, 2))
        here = torch.stack([sending.counts for sending in announced.sendings], 1)
        sizes = torch.stack((here, there)).permute(2, 3, 0, 1).cpu()  # [pieces, 2, 2, n], of rows and choices
        rows = zip(*(each.tensor_split(self.pieces) for each in (tokens, gates, *packed)), strict=True)
        return tuple(
            self._ship((tokens, gates, slots.int(), *others), sending, size)
            for (tokens, gates, *others), slots, sending, size in zip(rows, *announced[:2], sizes, strict=True)
        )

    def arrive(self, shipped: Shipped) -> Arrived:
        flight, choices, home = shipped.ticket
        there, gates, slots = arrive(flight, *shipped.tensors)
        mine, layout = self._lay_out(slots, choices)
        return Arrived(there, gates.flatten().index_select(0, mine), layout._replace(home=home))

    def combine(self, computed: tuple[Tensor, Layout]) -> Shipped:
        mixed, layout = computed
        assert layout.home is not None
        sent, received = layout.home.splits.tolist()
        route = FromExperts(Way(received, sent, self._tokens), self._back)
        flight, connection = depart(route, self.lanes, mixed)
        return Shipped((connection,), (flight, layout.home.copies))

    def collect(self, shipped: Shipped) -> Tensor:
        flight, copies = shipped.ticket
        (rows,) = arrive(flight, *shipped.tensors)
        return collect(rows, copies)

    def _ship(self, tensors: tuple[Tensor, ...], sending: Sending, sizes: Tensor) -> Shipped:
        """Starts to send a piece, as ``ToExperts`` takes it; ``sizes`` [2, 2, n]: rows and choices, here and there."""
        (sent, received), (_, choices) = sizes.tolist()
        copies = copy_out(sending.touched, sum(sent))
        route = ToExperts(copies, Way(sent, received, self._tokens), self._there)
        flight, connection = depart(route, self.lanes, *tensors)
        return Shipped((connection,), (flight, sum(choices), Home(copies, sizes[0])))

    def take_travelled(self) -> Tensor:
        """What has been moved since this was last asked: [4], see ``parallel.locality.Travel``."""
        travelled, self._travelled = self._travelled, torch.zeros_like(self._travelled)
        return travelled

    def _lay_out(self, slots: Tensor, choices: int) -> tuple[Tensor, Layout]:
        """``slots`` [R, K] of tokens that have arrived -> the choices among them for here, [C], and a layout."""
        rows, k = slots.shape
        local = self.experts // self.ranks
        mine = (slots // local == self._view.place).flatten().nonzero_static(size=choices).squeeze(1)
        held = slots.flatten().index_select(0, mine).long() % local
        return mine, lay_out(held, mine // k, rows, local, self.pad)


def address(slots: Tensor, experts: int, ranks: int) -> Sending:
    """``slots`` [T, K] of tokens, of ``experts`` in all -> what goes to each of ``ranks``."""
    rank = slots // (experts // ranks)  # [T, K]
    touched = torch.zeros(ranks, len(slots), dtype=torch.int64, device=slots.device).scatter_(0, rank.t(), 1)
    choices = touched.new_zeros(ranks).scatter_add_(0, rank.flatten(), torch.ones_like(rank).flatten())
    return Sending(touched, torch.stack((touched.sum(1), choices), 1))


def copy_out(touched: Tensor, rows: int) -> Copies:
    """``touched`` [n, T], ``rows`` in all -> the rows that leave, rank by rank, each rank's in the order of tokens."""
    ranks, held = touched.shape
    by_token = touched.t().flatten()
    places = (touched.flatten().cumsum(0) - 1).view(ranks, held).t().flatten()  # [T n], where a copy is sent
    source = touched.flatten().nonzero_static(size=rows).squeeze(1) % held
    slots = places.index_select(0, by_token.nonzero_static(size=rows).squeeze(1))
    each = touched.sum(0)
    return Copies(source, slots, each.cumsum(0) - each)


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
