"""Moving tokens to their experts and back: the seam behind which expert parallelism works.

Tokens are copied once for each of their choices, and the copies are laid out expert by expert, each run padded to a
multiple of ``pad`` so that product shapes repeat:

    rows  | expert 0 . . pad | expert 1 . pad | ... | unused |     P = C + E (pad - 1) rounded up: the same every step
    source[p]   the token that row p is a copy of (0 for padding: read, never returned)
    slots[c]    the row of choice c, where choices are counted token by token
    starts[t]   the first choice of token t

With these at hand, gathers serve all four directions: to the experts, back, and their gradients.
Shapes: tokens [T, H], K choices a token, C choices in all, experts and gates [T, K] or [C], rows [P, H].
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from model.device import kernel
from model.operator import operator, register_fake


class Copies(NamedTuple):
    """Which row is a copy of which token, read from both ends."""

    source: Tensor  # [P] int64, the token of each row
    slots: Tensor  # [C] int64, the rows of each token's copies, token by token
    starts: Tensor  # [T] int64, where each token's slots begin


class Home(NamedTuple):
    """How rows find their way back to the ranks of their tokens."""

    copies: Copies  # of this rank's tokens among the rows that it sent
    splits: Tensor  # [2, ranks] int64 on the CPU, rows that went from here to each rank, and that came from each


class Layout(NamedTuple):
    """How rows lie in memory, expert by expert."""

    copies: Copies
    ends: Tensor  # [E] int32, where each expert's padded run ends
    home: Home | None = None  # where tokens have left their rank


class Arrived(NamedTuple):
    """Tokens where their experts are: those that have one here, and their choices that are here."""

    tokens: Tensor  # [R, H]
    gates: Tensor  # [C], the weight of each choice
    layout: Layout


class Shipped(NamedTuple):
    """Rows on their way: between the two halves of an exchange, gradients go through ``tensors`` alone."""

    tensors: tuple[Tensor, ...]
    ticket: Any  # whatever the other half needs besides


class Exchange(Protocol):
    """Brings tokens to the rank that holds their experts, and what the experts made of them back.

    There and back are two halves each: the first starts and returns at once, the second waits. Tokens may go in several
    ``pieces``, each by itself.
    """

    pieces: int

    def announce(self, experts: Tensor) -> Any:
        """Starts to tell how many tokens will come, of choices [T, K]; gives what ``dispatch`` wants."""
        ...

    def dispatch(self, tokens: Tensor, gates: Tensor, announced: Any) -> tuple[Shipped, ...]:
        """Starts to send tokens [T, H] with the gates [T, K] of their choices, each piece by itself."""
        ...

    def arrive(self, shipped: Shipped) -> Arrived:
        """The tokens and choices of a piece that are for this rank's experts."""
        ...

    def combine(self, computed: tuple[Tensor, Layout]) -> Shipped:
        """Starts to send weighed outputs [R, H], one row for each token that arrived, back to where they came from."""
        ...

    def collect(self, shipped: Shipped) -> Tensor:
        """Those of this rank's tokens of a piece, [T / pieces, H]."""
        ...


def lay_out(experts: Tensor, tokens: Tensor, held: int, count: int, pad: int) -> Layout:
    """The padded layout of choices ``experts`` [C] among ``count``, of ``tokens`` [C], ascending and below ``held``.

    Within an expert, rows keep the order of tokens.
    """
    sizes = torch.zeros(count, dtype=torch.int64, device=experts.device)
    sizes = sizes.scatter_add_(0, experts, torch.ones_like(experts))
    padded = (sizes + pad - 1) // pad * pad
    ends = padded.cumsum(0)
    order = experts.argsort(stable=True)
    shift = (ends - padded) - (sizes.cumsum(0) - sizes)  # from a choice's place in `order` to its row
    place = torch.arange(len(experts), device=experts.device)
    row = place + shift.index_select(0, experts.index_select(0, order))
    capacity = -(-(len(experts) + count * (pad - 1)) // pad) * pad if len(experts) else 0
    source = experts.new_zeros(capacity).scatter_(0, row, tokens.index_select(0, order))
    slots = torch.empty_like(experts).scatter_(0, order, row)
    starts = torch.searchsorted(tokens, torch.arange(held, device=experts.device))
    return Layout(Copies(source, slots, starts), ends.int())


class LocalExchange:
    """All experts are here: tokens stay where they are and only the layout is computed."""

    pieces = 1

    def __init__(self, experts: int, pad: int) -> None:
        self.experts, self.pad = experts, pad

    def announce(self, experts: Tensor) -> Tensor:
        return experts

    def dispatch(self, tokens: Tensor, gates: Tensor, announced: Tensor) -> tuple[Shipped, ...]:
        held, choices = announced.shape
        owners = torch.arange(held, device=announced.device).repeat_interleave(choices)
        layout = lay_out(announced.flatten(), owners, held, self.experts, self.pad)
        return (Shipped((tokens, gates.flatten()), layout),)

    def arrive(self, shipped: Shipped) -> Arrived:
        tokens, gates = shipped.tensors
        return Arrived(tokens, gates, shipped.ticket)

    def combine(self, computed: tuple[Tensor, Layout]) -> Shipped:
        mixed, _ = computed
        return Shipped((mixed,), None)

    def collect(self, shipped: Shipped) -> Tensor:
        (mixed,) = shipped.tensors
        return mixed


class Permute(torch.autograd.Function):
    """rows[p] = tokens[source[p]]; the gradient of a token is the sum over its copies."""

    @staticmethod
    def forward(ctx, tokens: Tensor, source: Tensor, slots: Tensor, starts: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(slots, starts)
        return tokens.index_select(0, source)

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        return sum_copies(g, *ctx.saved_tensors), None, None, None


class Unpermute(torch.autograd.Function):
    """out[t] = sum of gates[c] rows[slots[c]] over the choices c of token t."""

    @staticmethod
    def forward(ctx, rows: Tensor, gates: Tensor, source: Tensor, slots: Tensor, starts: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows, gates, source, slots, starts)
        return sum_copies(rows, slots, starts, gates)

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        return *_weigh_back(g.contiguous(), *ctx.saved_tensors), None, None, None


class Collect(torch.autograd.Function):
    """out[t] = sum of rows[slots[c]] over the copies c of token t, where every row is a copy of some token."""

    @staticmethod
    def forward(ctx, rows: Tensor, source: Tensor, slots: Tensor, starts: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(source)
        return sum_copies(rows, slots, starts)

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        return g.index_select(0, *ctx.saved_tensors), None, None, None


class Sums(NamedTuple):
    """The sum over each token's copies and its gradient, on one device type, with the arguments of those below."""

    forward: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Copies], tuple[Tensor, Tensor]]


def _sum(rows: Tensor, slots: Tensor, starts: Tensor, weights: Tensor | None) -> Tensor:
    # One pass that adds in float32: on a CPU twenty times as fast as a gather, a product and a sum.
    weights = None if weights is None else weights.to(rows.dtype)
    return F.embedding_bag(slots, rows, starts, mode="sum", per_sample_weights=weights)


def _differentiate(g: Tensor, rows: Tensor, weights: Tensor, copies: Copies) -> tuple[Tensor, Tensor]:
    source, slots, _ = copies
    # A padding row's weight is zero, so nothing flows back through it.
    weight = rows.new_zeros(len(source)).scatter_(0, slots, weights.to(rows.dtype))
    g_rows = g.index_select(0, source)
    g_weight = (rows * g_rows).sum(-1, dtype=weights.dtype)
    return g_rows.mul_(weight[:, None]), g_weight.index_select(0, slots)


SUMS = {"cpu": Sums(_sum, _differentiate), "cuda": Sums(kernel("copies:sum_copies"), kernel("copies:weigh_back"))}


@operator("shoestring::sum_copies")
def _sum_copies(rows: Tensor, slots: Tensor, starts: Tensor, weights: Tensor | None) -> Tensor:
    return SUMS[rows.device.type].forward(rows, slots, starts, weights)


@register_fake(_sum_copies)
def _(rows: Tensor, slots: Tensor, starts: Tensor, weights: Tensor | None) -> Tensor:
    return rows.new_empty(starts.shape[0], rows.shape[1])  # not len: a size that varies would be taken for a constant


@operator("shoestring::weigh_back")
def _weigh_back(
    g: Tensor, rows: Tensor, weights: Tensor, source: Tensor, slots: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    return SUMS[g.device.type].backward(g, rows, weights, Copies(source, slots, starts))


@register_fake(_weigh_back)
def _(g: Tensor, rows: Tensor, weights: Tensor, source: Tensor, slots: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weights)


def sum_copies(rows: Tensor, slots: Tensor, starts: Tensor, weights: Tensor | None = None) -> Tensor:
    """``rows`` [P, H] -> [T, H], the sum over each token's copies, by ``weights`` [C] if any; ``Copies`` says where."""
    return _sum_copies(rows, slots, starts, weights)


def permute(tokens: Tensor, copies: Copies) -> Tensor:
    """[R, H] -> [P, H]."""
    return Permute.apply(tokens, *copies)


def unpermute(rows: Tensor, gates: Tensor, copies: Copies) -> Tensor:
    """[P, H] and gates [C] -> [R, H], weighed in the dtype of the rows and summed in float32 or wider."""
    return Unpermute.apply(rows, gates, *copies)


def collect(rows: Tensor, copies: Copies) -> Tensor:
    """[P, H] -> [T, H], summed; there is no padding among the rows."""
    return Collect.apply(rows, *copies)
