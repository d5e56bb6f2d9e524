"""Data parallelism of our own: ZeRO-1 (arXiv 1910.02054) over each parameter's holders; one process is its least case.

    backward    every rank adds its gradients up in full; in the last one of a stage, each bucket's sum over the holders
                starts behind its last gradient, every piece to the rank that owns it
    finished    the sums that are left
    step        norm over all owned pieces of all ranks --> clip --> AdamW on the own pieces
    forward     the new weights to all holders, in the parameters' dtype, each bucket before it is read

Which ranks hold the same part of a parameter follows from its placement: experts have fewer holders than norms, and a
stage's ranks are the most. Parameters of the same holders, dtype and decay share a slab (training/slab.py), last ones
first, so that a backward fills its buckets one after the other. Buckets are a pure function of the configuration, and
so is their order: sums run from the model's end to its beginning, copies the other way. When a bucket starts is counted
(training/countdown.py); the bits do not depend on it.

Between ``step`` and the forwards that follow, weights are on their way: whoever reads them otherwise calls ``settle``.

Bytes of a rank for P elements held of which Q = P / holders are owned, c = bytes of a parameter, 2 in bfloat16:

    c P weights + 4 P gradients + 4 Q masters (none where parameters are float32) + 8 Q moments (4 Q in bfloat16)

and, while gradients travel, two buckets (``optimizer.bucket_bytes`` each).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from parallel.doing import doing
from parallel.mesh import Mesh
from parallel.placement import Shard
from training.agree import sum_over
from training.chunk import Chunk, fill
from training.config import OptimizerConfig
from training.engine import Hidden, State, Unrolling, Update, differentiate, unroll_stage
from training.optimizer import sum_squares, update
from training.share import share_slabs
from training.transit import Copies, Sums, Travel


class Native:
    """The engine of choice: supports every layout."""

    def __init__(
        self, stages: Mapping[int, nn.Module], shards: Mapping[str, Shard], mesh: Mesh, config: OptimizerConfig
    ) -> None:
        """Takes the stages' parameters over: their storage moves into buffers, and ``.grad`` stays ``None``.

        ``shards`` says which part of each parameter this rank holds, by the name it has in its module.
        Raises ValueError for a pattern of ``optimizer.no_decay`` that matches no parameter.
        """
        self.config, self._mesh, self._stages = config, mesh, stages
        self._steps = 0  # updates applied, the t of the bias correction
        shares = share_slabs(stages, shards, mesh, config)
        buckets = [share.of for share in shares]
        self._slabs = list(dict.fromkeys(bucket.slab for bucket in buckets))
        self._slab_of = {parameter: bucket.slab for bucket in buckets for parameter in bucket.parameters}
        self._sums = Sums(shares, stages, mesh.device)
        self._copies = Copies(buckets, stages, mesh.device)
        for parameter in self._slab_of:
            parameter.register_post_accumulate_grad_hook(self._take)

    def begin(self) -> None:
        """Forgets the gradients: those of the next step start here."""
        self._sums.begin()
        for slab in self._slabs:
            slab.begin()

    def forward(self, stage: int, *args: object) -> object:
        """Calls the module of ``stage``."""
        return self._stages[stage](*args)

    def unroll(self, stage: int, *args: object) -> Unrolling:
        """Calls the module of ``stage`` segment by segment."""
        return unroll_stage(self._stages[stage], *args)

    def backward(self, stage: int, loss: Tensor, hidden: Hidden = None) -> None:
        """Adds the gradients of ``loss``, and of what went to the next stage, to the step's."""
        differentiate(loss, hidden)

    def accumulate(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """Adds ``grad`` (the parameter's shape, any float dtype) to the step's gradient of ``parameter``.

        The only way in: autograd's hook calls it, and so does whoever runs deferred weight gradients.
        """
        self._slab_of[parameter].accumulate(parameter, grad)
        self._sums.take(parameter)

    def finishing(self, stage: int, coming: Sequence[Tensor] | None = None) -> None:
        """The stage's last backward of the step begins: its sums start from now on, each behind its last gradient."""
        self._sums.open(stage, coming)

    def finished(self, stage: int) -> None:
        """Starts the sums of ``stage`` that have not started. Collective over the stage's ranks."""
        self._sums.close(stage)

    @doing("optimizer")
    @torch.no_grad()
    def step(self, lr: float, finite: bool = True) -> Update:
        """Clips and updates, unless the gradient or, say the callers on all ranks, the loss is not finite.

        Collective over all ranks. New weights are on their way when it returns: see ``settle``.
        """
        assert not self._sums.waiting, "stages have not finished"
        self.settle()
        norm = self._measure_norm()
        if not (finite and math.isfinite(norm)):
            return Update(norm, 1.0, False)
        factor = self.config.clip / norm if 0 < self.config.clip < norm else 1.0
        self._steps += 1
        for slab in self._slabs:
            for part in slab.parts:
                update(part, self.config, self._steps, lr, factor)
        self._copies.launch()
        return Update(norm, factor, True)

    def settle(self) -> None:
        """Waits for all that is under way: for whoever reads parameters without a forward, and whoever leaves."""
        self._sums.settle()
        self._copies.settle()

    def record(self, travels: list[Travel] | None) -> None:
        """From now on ``travels`` gets when each bucket was under way, until it is told None."""
        self._sums.journal.travels = self._copies.journal.travels = travels

    def state(self) -> State:
        """This rank's part of masters and moments: views, each of them on one rank only."""
        self.settle()  # a master may be a weight, and what others are being sent must stay as it is
        return State(self._steps, [chunk for slab in self._slabs for chunk in slab.chunks()])

    def held(self) -> list[Chunk]:
        """The chunks of ``state``: no rank has what another one has."""
        return self.state().chunks

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Takes over what ``state`` gave, on however many ranks, and sets the parameters. Collective.

        ``state`` covers at least what this rank owns. Raises ValueError naming what is missing or of another shape.
        """
        if wrong := fill(self.state().chunks, state.chunks):
            raise ValueError(f"optimizer state does not fit the model: {', '.join(wrong[:5])}")
        self._steps = state.steps
        for slab in self._slabs:
            slab.cast()
        self._copies.launch()
        self.settle()

    def count_bytes(self) -> int:
        """Bytes of all buffers on this rank."""
        return sum(slab.count_bytes() for slab in self._slabs)

    def _measure_norm(self) -> float:
        """Over all ranks; owned pieces are disjoint, so every element counts once."""
        squares = sum_squares([part.grad for slab in self._slabs for part in slab.parts], self._mesh.device)
        return sum_over(squares, self._mesh).sqrt().item()

    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        if parameter.grad is None:  # its gradient is put off
            return
        self.accumulate(parameter, parameter.grad)
        parameter.grad = None
