"""Moving tokens to their experts and back: the seam behind which expert parallelism works.

Expert rows are laid out expert by expert, each run padded to a multiple of ``pad`` so that product shapes repeat:

    rows  | expert 0 . . pad | expert 1 . pad | ... | unused |     P = T K + E (pad - 1) rounded up: the same every step
    source[p]   the input row that slot p holds (0 for padding: read, never returned)
    slots[t,k]  the slot of token t's k-th choice

With both maps at hand, gathers serve all four directions: to the experts, back, and their gradients.
Shapes: tokens [T, H], experts and gates [T, K], rows [P, H].
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Home(NamedTuple):
    """How rows that came from other ranks find their way back."""

    sent: Tensor  # [ranks] int64, rows that went from here to each rank
    received: Tensor  # [ranks] int64, rows that came from each rank
    source: Tensor  # [T K] int64, the token of each row sent
    slots: Tensor  # [T, K] int64, where each choice lies among the rows sent


class Layout(NamedTuple):
    """How rows lie in memory, expert by expert."""

    source: Tensor  # [P] int64, the input row each slot holds
    slots: Tensor  # [R, K] int64, the slots of each input row
    ends: Tensor  # [E] int32, where each expert's padded run ends
    home: Home | None = None  # where tokens have left their rank


class Exchange(Protocol):
    """Brings tokens to the rank that holds their experts, and expert outputs back."""

    def dispatch(self, tokens: Tensor, experts: Tensor) -> tuple[Tensor, Layout]:
        """tokens [T, H], experts [T, K] -> rows received [R, H] and how this rank's experts see them."""
        ...

    def combine(self, rows: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        """Expert outputs [P, H] -> rows back home, and where each choice of each token lies in them."""
        ...


def lay_out(experts: Tensor, count: int, pad: int) -> Layout:
    """The padded layout of choices [T, K] among ``count`` experts. Within an expert, rows keep the order of tokens."""
    tokens, k = experts.shape
    flat = experts.flatten()
    sizes = torch.zeros(count, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    padded = (sizes + pad - 1) // pad * pad
    ends = padded.cumsum(0)
    order = flat.argsort(stable=True)
    shift = (ends - padded) - (sizes.cumsum(0) - sizes)  # from a choice's place in `order` to its slot
    slot = torch.arange(len(flat), device=flat.device) + shift[flat[order]]
    capacity = -(-(len(flat) + count * (pad - 1)) // pad) * pad if tokens else 0
    source = flat.new_zeros(capacity).scatter_(0, slot, order // k)
    slots = torch.empty_like(flat).scatter_(0, order, slot).view(tokens, k)
    return Layout(source, slots, ends.int())


class LocalExchange:
    """All experts are here: tokens stay where they are and only the layout is computed."""

    def __init__(self, experts: int, pad: int) -> None:
        self.experts, self.pad = experts, pad

    def dispatch(self, tokens: Tensor, experts: Tensor) -> tuple[Tensor, Layout]:
        return tokens, lay_out(experts, self.experts, self.pad)

    def combine(self, rows: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        return rows, layout


class Permute(torch.autograd.Function):
    """rows[p] = tokens[source[p]]; the gradient gathers each token's slots and sums them."""

    @staticmethod
    def forward(ctx, tokens: Tensor, source: Tensor, slots: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(slots)
        return tokens.index_select(0, source)

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        (slots,) = ctx.saved_tensors
        return g.index_select(0, slots.flatten()).unflatten(0, slots.shape).sum(1), None, None


class Unpermute(torch.autograd.Function):
    """out[t] = sum_k gates[t, k] rows[slots[t, k]], summed in the dtype of the gates."""

    @staticmethod
    def forward(ctx, rows: Tensor, gates: Tensor, source: Tensor, slots: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows, gates, source, slots)
        chosen = rows.index_select(0, slots.flatten()).unflatten(0, slots.shape)
        return (chosen * gates[..., None]).sum(1).to(rows.dtype)

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        rows, gates, source, slots = ctx.saved_tensors
        # A padding slot's gate is zero, so nothing flows back through it.
        gate = gates.new_zeros(len(source)).scatter(0, slots.flatten(), gates.flatten())
        chosen = rows.index_select(0, slots.flatten()).unflatten(0, slots.shape)
        # Weighed in the rows' own dtype and in place: a float32 product of this size costs 4% of an eager step.
        g_rows = g.index_select(0, source).mul_(gate[:, None].to(rows.dtype))
        return g_rows, (chosen * g[:, None]).sum(-1, dtype=gates.dtype), None, None


def permute(tokens: Tensor, layout: Layout) -> Tensor:
    """[R, H] -> [P, H] in expert order."""
    return Permute.apply(tokens, layout.source, layout.slots)


def unpermute(rows: Tensor, gates: Tensor, layout: Layout) -> Tensor:
    """[P, H] and gates [T, K] -> [T, H], weighed and summed."""
    return Unpermute.apply(rows, gates, layout.source, layout.slots)
