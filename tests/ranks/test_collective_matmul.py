"""Gathers and sums with the products beside them, each way: plain Linear on whole sequences, in value and gradients.

    shards [B, s, I] -- gather --> [B, n s, I] -- columns of W --> y -- rows of V --> partial sums -- scatter --> z

beside a second tensor that is only gathered. Plain: z = (x W^T) V^T on one device.
"""

import time
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from small_models import make_config
from spawn import run_ranks
from torch import Tensor, nn

from model.config import Recompute
from model.linear import Linear, WeightGradient
from model.recompute import list_repeated, runner
from parallel import collective_matmul, tensor
from parallel.collective_matmul import MATMULS, Matmuls, Operation, gather_blocks, scatter_blocks, scatter_joined
from parallel.config import TensorOverlap
from parallel.mesh import Mesh
from parallel.placement import span
from parallel.tensor import ShardedSequence, choose_operation
from parallel.topology import Topology

INNER, OUTER, LENGTH = 5, 7, 3  # OUTER divides by no number of ranks
WAYS = (Operation.joined, Operation.blocks)


class Drawn(NamedTuple):
    """The same on every rank."""

    x: Tensor  # [B, S, I]
    beside: Tensor  # [B, S, 2]
    wide: Tensor  # [2, O, I]
    narrow: Tensor  # [4, 2 O]
    weights: Tensor  # [n, B, S, 2]: of ``beside`` in the loss, by rank
    targets: Tensor  # [B, S, 4]: of z


class Made(NamedTuple):
    """Results of a rank, or the same cut of the plain ones."""

    z: Tensor
    x: Tensor  # gradients from here on
    beside: Tensor
    wide: Tensor
    narrow: Tensor


def draw(world: int, sequences: int, dtype: torch.dtype) -> Drawn:
    generator, length = torch.Generator().manual_seed(world), LENGTH * world
    shapes = [(sequences, length, INNER), (sequences, length, 2), (2, OUTER, INNER), (4, 2 * OUTER)]
    shapes += [(world, sequences, length, 2), (sequences, length, 4)]
    return Drawn(*(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes))


def columns(rank: int, world: int) -> slice:
    part = span(OUTER, world, rank)
    return slice(part.start, part.stop)


def make_plain(drawn: Drawn, rank: int) -> Made:
    world = len(drawn.weights)
    x, beside, wide, narrow = (t.clone().requires_grad_() for t in drawn[:4])
    z = (x @ wide.flatten(0, 1).t()) @ narrow.t()
    ((z * drawn.targets).sum() + (beside * drawn.weights.sum(0)).sum()).backward()
    rows, own = slice(LENGTH * rank, LENGTH * (rank + 1)), columns(rank, world)
    assert x.grad is not None and beside.grad is not None and wide.grad is not None and narrow.grad is not None
    gv = narrow.grad.unflatten(1, (2, OUTER))[:, :, own].flatten(1)
    return Made(z.detach()[:, rows], x.grad[:, rows], beside.grad[:, rows], wide.grad[:, own], gv)


def hold(weight: Tensor) -> Linear:
    linear = Linear(weight.shape[-1], *weight.shape[:-1])
    linear.weight = nn.Parameter(weight.clone())
    return linear


def make_sharded(drawn: Drawn, rank: int, sequence: ShardedSequence, put_off: bool, recompute: Recompute) -> Made:
    rows, own = slice(LENGTH * rank, LENGTH * (rank + 1)), columns(rank, len(drawn.weights))
    x, beside = (t[:, rows].clone().requires_grad_() for t in (drawn.x, drawn.beside))
    up, down = hold(drawn.wide[:, own]), hold(drawn.narrow.unflatten(1, (2, OUTER))[:, :, own].flatten(1))
    deferred: list[WeightGradient] | None = [] if put_off else None

    def body(x: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
        y, whole = sequence.gather_linear((x, beside), (up,), deferred)
        return sequence.linear_scatter(y, down, deferred), whole

    z, whole = runner(make_config(recompute=recompute))(body, x, beside)
    ((z * drawn.targets[:, rows]).sum() + (whole * drawn.weights[rank]).sum()).backward()
    assert (up.weight.grad is None) == (down.weight.grad is None) == put_off
    for weight, compute in deferred or ():
        weight.grad = compute().detach()
    assert x.grad is not None and beside.grad is not None
    assert up.weight.grad is not None and down.weight.grad is not None
    return Made(z.detach(), x.grad, beside.grad, up.weight.grad, down.weight.grad)


def compare(rank: int, world: int) -> dict[str, float]:
    """The largest difference from the plain numbers, for every way."""
    group, found = dist.group.WORLD, {}
    assert group is not None
    for sequences in (1, 2):
        drawn = draw(world, sequences, torch.float64)
        expected = make_plain(drawn, rank)
        for how in WAYS:
            for policy in Recompute:
                sequence = ShardedSequence(group, how, list_repeated(make_config(recompute=policy)))
                for put_off in (False, True):
                    made, again = (make_sharded(drawn, rank, sequence, put_off, policy) for _ in range(2))
                    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))
                    apart = [float((a - b).abs().max()) for a, b in zip(made, expected, strict=True)]
                    found[f"{how} {sequences} {policy} {put_off}"] = max(apart)
    return found


@pytest.mark.parametrize("world", [2, 3, pytest.param(4, marks=pytest.mark.full)])
def test_values_and_gradients_are_the_plain_ones(world: int) -> None:
    for found in run_ranks(compare, world):
        assert len(found) == 24 and max(found.values()) < 1e-13, found


def compare_messages(rank: int, world: int) -> bool:
    """Whether blocks of other backends than gloo, and sums in bfloat16, give the bits that they should."""
    group, drawn = dist.group.WORLD, draw(world, 2, torch.bfloat16)
    assert group is not None
    summed = scatter_blocks([drawn.x * (rank + 1), drawn.beside], [], group)
    same = all(map(torch.equal, summed, scatter_joined([drawn.x * (rank + 1), drawn.beside], [], group)))
    rows, weights = slice(LENGTH * rank, LENGTH * (rank + 1)), [drawn.wide[0].t()]
    asked = [gather_blocks([drawn.x[:, rows]], weights, group), scatter_blocks([drawn.x], weights, group)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collective_matmul, "_batches", lambda group: True)
        batched = [gather_blocks([drawn.x[:, rows]], weights, group), scatter_blocks([drawn.x], weights, group)]
    return same and all(torch.equal(a, b) for x, y in zip(asked, batched, strict=True) for a, b in zip(x, y))  # noqa: B905


def test_messages_give_the_same_bits() -> None:
    assert all(run_ranks(compare_messages, 3))


def count_exchanges(rank: int, world: int, policy: Recompute) -> list[str]:
    """What is called in a forward and a backward."""
    group, calls, drawn = dist.group.WORLD, list[str](), draw(world, 1, torch.float64)
    assert group is not None

    def counted(name: str, call: Any, *args: Any, **options: Any) -> Any:
        calls.append(name)
        return call(*args, **options)

    way = MATMULS[Operation.blocks]
    with pytest.MonkeyPatch.context() as patch:
        watched = Matmuls(partial(counted, "gather", way.gather), partial(counted, "scatter", way.scatter))
        patch.setitem(MATMULS, Operation.blocks, watched)
        patch.setattr(tensor, "gather", partial(counted, "gather joined", tensor.gather))
        sequence = ShardedSequence(group, Operation.blocks, list_repeated(make_config(recompute=policy)))
        make_sharded(drawn, rank, sequence, False, policy)
    return calls


def test_no_exchange_is_made_twice() -> None:
    """Forward: gather, scatter. Backward: gather of the one, scatter of the other. Recomputation adds none."""
    for policy in Recompute:
        assert run_ranks(count_exchanges, 2, policy) == [["gather", "scatter", "gather", "scatter"]] * 2


def hide(rank: int, world: int) -> dict[str, list[str]]:
    """What a rank does in which order: products of how many rows, and which messages it starts."""
    group, drawn, found = dist.group.WORLD, draw(world, 1, torch.float64), {}
    assert group is not None
    swap, weight = collective_matmul._swap, drawn.wide[0].t()
    for name, given in (("gather", drawn.x[:, :LENGTH]), ("scatter", drawn.x)):
        events = found.setdefault(name, list[str]())

        def start(sent: Tensor, target: int, room: Tensor, source: int, group: Any, events: Any = events) -> Any:
            events.append(f"to {(target - rank) % world} from {(source - rank) % world}")
            return swap(sent, target, room, source, group)

        def product(x: Tensor, weight: Tensor, out: Tensor, events: Any = events) -> None:
            events.append(f"{len(x)} rows")
            time.sleep(0.001)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collective_matmul, "_swap", start)
            getattr(MATMULS[Operation.blocks], name)([given], [weight], group, product)
    return found


def test_messages_start_before_the_products_that_hide_them() -> None:
    gather = ["to 2 from 1", "3 rows", "to 1 from 2", "3 rows", "3 rows"]
    scatter = ["3 rows", "to 1 from 2", "3 rows", "to 2 from 1", "3 rows"]
    assert run_ranks(hide, 3) == [{"gather": gather, "scatter": scatter}] * 3


def choose(rank: int, world: int) -> list[str]:
    """What a processor takes."""
    mesh = Mesh(Topology(tp=2), torch.device("cpu"))
    chosen = [str(choose_operation(wanted, mesh)) for wanted in list(TensorOverlap)[:3]]
    with pytest.raises(ValueError, match=r"^parallel.overlap.tensor=fused must be auto, joined or blocks here: "):
        choose_operation(TensorOverlap.fused, mesh)
    return chosen


def test_a_processor_has_no_fused_operators() -> None:
    assert run_ranks(choose, 2) == [["blocks", "joined", "blocks"]] * 2
