"""Data parallelism of our own: ZeRO-1 (arXiv 1910.02054) over each parameter's holders; one process is its least case.

    backward    every rank adds its gradients up in full
    finished    each bucket's sum over the holders, every piece on the rank that owns it
    step        norm over all owned pieces of all ranks --> clip --> AdamW on the own pieces
                --> the new weights to all holders, in the parameters' dtype

Which ranks hold the same part of a parameter follows from its placement: experts have fewer holders than norms, and a
stage's ranks are the most. Parameters of the same holders, dtype and decay share a slab (training/slab.py); a slab's
buckets are a pure function of the configuration.

Bytes of a rank for P elements held of which Q = P / holders are owned, c = bytes of a parameter, 2 in bfloat16:

    c P weights + 4 P gradients + 4 Q masters (none where parameters are float32) + 8 Q moments (4 Q in bfloat16)

and, while gradients travel, two buckets (``optimizer.bucket_bytes`` each).
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from parallel.mesh import Mesh
from parallel.placement import Shard
from training.agree import sum_over
from training.chunk import fill
from training.config import MomentDtype, OptimizerConfig
from training.engine import (
    Hidden,
    Share,
    State,
    Unrolling,
    Update,
    Waiting,
    differentiate,
    name_parameters,
    unroll_stage,
)  # fmt: skip
from training.optimizer import match, sum_squares, update
from training.slab import Entry, Slab, complete


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
        named, users = name_parameters(stages)
        undecayed = match(config.no_decay, named)
        alike: dict[tuple[object, ...], list[Entry]] = {}
        for name, parameter in named.items():
            shard = shards[name]
            key = users[name], name in undecayed, shard.placement.holders, shard.across, parameter.dtype
            alike.setdefault(key, []).append(Entry(name, parameter, shard))
        self._slabs: list[Share[Slab]] = []  # and the stages that they belong to
        self._places: dict[nn.Parameter, tuple[Slab, int]] = {}
        for (_, kept, *_), entries in alike.items():
            slab = Slab(
                entries,
                mesh,
                0.0 if kept else config.weight_decay,
                config.moments is MomentDtype.bf16,
                config.bucket_bytes,
            )
            self._slabs.append(Share(users[entries[0].name], slab.crosses, slab))
            self._places |= {entry.parameter: (slab, place) for place, entry in enumerate(entries)}
        self._waiting = Waiting(stages)
        self._under_way: list[Future[None]] = []
        # On a CPU sums are waited for beside the pipeline, in a thread of their own, one after the other. Devices have
        # streams, and nobody waits for them here.
        alone = len(stages) == 1 or mesh.device.type != "cpu"
        self._beside = None if alone else ThreadPoolExecutor(1, "gradients")
        for parameter in self._places:
            parameter.register_post_accumulate_grad_hook(self._take)

    def begin(self) -> None:
        """Forgets the gradients: those of the next step start here."""
        for slab in self._all():
            slab.begin()
        self._waiting.begin()

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
        slab, place = self._places[parameter]
        slab.accumulate(place, grad)

    def finished(self, stage: int) -> None:
        """Starts to sum the gradients of ``stage`` over their holders. Collective over the stage's ranks."""
        ready = self._waiting.finish(stage, self._slabs)
        if self._waiting and self._beside is not None:
            self._under_way.append(self._beside.submit(_sum, ready))
        else:
            self._complete()
            _sum(ready)

    @torch.no_grad()
    def step(self, lr: float, finite: bool = True) -> Update:
        """Clips and updates, unless the gradient or, say the callers on all ranks, the loss is not finite.

        Collective over all ranks.
        """
        assert not self._waiting, "stages have not finished"
        assert not self._under_way
        norm = self._measure_norm()
        if not (finite and math.isfinite(norm)):
            return Update(norm, 1.0, False)
        factor = self.config.clip / norm if 0 < self.config.clip < norm else 1.0
        self._steps += 1
        for slab in self._all():
            for part in slab.parts:
                update(part, self.config, self._steps, lr, factor)
        self._publish()
        return Update(norm, factor, True)

    def state(self) -> State:
        """This rank's part of masters and moments: views, each of them on one rank only."""
        return State(self._steps, [chunk for slab in self._all() for chunk in slab.chunks()])

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Takes over what ``state`` gave, on however many ranks, and sets the parameters. Collective.

        ``state`` covers at least what this rank owns. Raises ValueError naming what is missing or of another shape.
        """
        if wrong := fill(self.state().chunks, state.chunks):
            raise ValueError(f"optimizer state does not fit the model: {', '.join(wrong[:5])}")
        self._steps = state.steps
        for slab in self._all():
            slab.cast()
        self._publish()

    def count_bytes(self) -> int:
        """Bytes of all buffers on this rank."""
        return sum(slab.count_bytes() for slab in self._all())

    def _all(self) -> list[Slab]:
        return [slab for _, _, slab in self._slabs]

    def _complete(self) -> None:
        for sums in self._under_way:
            sums.result()
        self._under_way.clear()

    def _measure_norm(self) -> float:
        """Over all ranks; owned pieces are disjoint, so every element counts once."""
        squares = sum_squares([part.grad for slab in self._all() for part in slab.parts], self._mesh.device)
        return sum_over(squares, self._mesh).sqrt().item()

    def _publish(self) -> None:
        complete(launched for slab in self._all() for launched in slab.publish())

    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        if parameter.grad is None:  # its gradient is put off
            return
        self.accumulate(parameter, parameter.grad)
        parameter.grad = None


@torch.no_grad()
def _sum(slabs: Sequence[Slab]) -> None:
    complete(launched for slab in slabs for launched in slab.reduce())
