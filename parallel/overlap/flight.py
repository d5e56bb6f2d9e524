"""A collective that autograd knows, in two halves: what starts it returns at once, what ends it waits.

    forward     tensors -- depart --> connection ........ arrive --> tensors          in between, compute what you like
    backward    gradients <-- depart ........ connection <-- arrive -- gradients      in between, compute what you like

A ``Flight`` says what is sent. The connection is an empty tensor: through it the graph of what comes after hangs on the
graph of what came before, so that in a backward ``arrive`` starts the way back and ``depart`` ends it. Autograd runs
what was computed between the two halves in between as well. Who cuts the graph at the connection (parallel/overlap) may
go on with the two parts whenever it likes.
"""

from typing import Protocol

import torch
from torch import Tensor

from model.mark import mark
from parallel.doing import doing
from parallel.overlap.lanes import Lanes
from parallel.pending import Pending

Tensors = tuple[Tensor | None, ...]  # None: of what wants no gradient


class Route(Protocol):
    """What a flight sends, and how its gradients come back. Neither is autograd's."""

    def there(self, *tensors: Tensor) -> Pending[Tensors]:
        """Starts the collective."""
        ...

    def back(self, *gradients: Tensor) -> Pending[Tensors]:
        """Starts that of the gradients of what has arrived; gives those of what departed."""
        ...


class Flight:
    """One collective under way, there or back."""

    def __init__(self, route: Route, lanes: Lanes) -> None:
        self._route, self._lanes = route, lanes
        self._under_way: Pending[Tensors] | None = None

    def leave(self, *tensors: Tensor) -> None:
        """Starts the way there."""
        with mark("leave", id(self)):
            self._under_way = self._lanes.start(self._route.there, *tensors)

    def turn(self, *gradients: Tensor) -> None:
        """Starts the way back."""
        with mark("leave", id(self)):
            self._under_way = self._lanes.start(self._route.back, *gradients)

    @doing("tokens of experts")
    def land(self) -> Tensors:
        """Waits for what is under way."""
        assert self._under_way is not None
        self._lanes.idle(None)
        pending, self._under_way = self._under_way, None
        with mark("land", id(self)):
            return pending.wait()


class Depart(torch.autograd.Function):
    """Starts a flight with tensors; ends that of their gradients."""

    @staticmethod
    def forward(ctx, flight: Flight, *tensors: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.flight, ctx.others = flight, len(tensors)
        flight.leave(*tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx, _: Tensor):  # type: ignore[no-untyped-def]
        back = ctx.flight.land()
        return None, *back, *(None,) * (ctx.others - len(back))


class Arrive(torch.autograd.Function):
    """Ends a flight; starts that of the gradients of what has come."""

    @staticmethod
    def forward(ctx, flight: Flight, connection: Tensor):  # type: ignore[no-untyped-def]
        ctx.flight = flight
        arrived = flight.land()
        ctx.mark_non_differentiable(
            *(tensor for tensor in arrived if tensor is not None and not tensor.is_floating_point())
        )
        return arrived

    @staticmethod
    def backward(ctx, *gradients: Tensor):  # type: ignore[no-untyped-def]
        ctx.flight.turn(*gradients)
        return None, gradients[0].new_empty(0)


def depart(route: Route, lanes: Lanes, *tensors: Tensor) -> tuple[Flight, Tensor]:
    """Starts ``route``: the flight, and the connection to end it with."""
    flight = Flight(route, lanes)
    return flight, Depart.apply(flight, *tensors)


def arrive(flight: Flight, connection: Tensor) -> tuple[Tensor, ...]:
    """What has come."""
    return Arrive.apply(flight, connection)
