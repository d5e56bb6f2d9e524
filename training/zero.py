"""Data parallelism by DeepSpeed: ZeRO-1 and ZeRO-2 (arXiv 1910.02054), as its ``DeepSpeedZeroOptimizer`` does them.

    holders     every rank of the stage      norms, routers
                ranks of the same tp place   what tp splits
                holders of the same experts  experts
                the same on several stages   an embedding that stages of several pipeline ranks have
    of each, and of each dtype, one optimizer of DeepSpeed's, with weight decay and without as its two groups

    stage 1     gradients add up on every rank; ``finished`` sums them over the holders
    stage 2     every backward sums its gradients over the holders as they come, and keeps the owned part; what several
                stages have is kept as in stage 1, because they run their backwards at other times

An optimizer sees only parameters that all ranks of its group hold alike, so that the ranks fill their buckets alike,
whatever tp cuts unevenly and wherever experts are folded over tp. DeepSpeed sums, cuts into owned pieces, steps
``torch.optim.AdamW`` on them and gathers. Sums stay sums (``gradient_average=False``). The norm, clipping and whether
to skip a step are decided here, on all owned pieces of all ranks.

Weight gradients that are put off never reach DeepSpeed's hooks: schedules that split the backward are for the native
engine.

Bytes of a rank for P elements held, Q = P / holders (and the rest of a division), c = bytes of a parameter:

    c P weights + 4 Q masters + 8 Q moments, gradients 4 P in stage 1 and 4 Q in stage 2

of which, in stage 1, 4 Q are left when they are summed; none when the step is over. While a backward or a sum runs,
each optimizer has a bucket (``optimizer.bucket_bytes``, or all its gradients if fewer); a step takes 4 Q more. Stage 2
keeps all of a parameter of which a rank owns a part while parameters are float32, and c bytes an element of them beside
the 4 Q while a backward runs if they are bfloat16.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.doing import doing
from parallel.mesh import Mesh
from parallel.placement import Shard
from training.agree import sum_over
from training.chunk import Chunk, fill
from training.config import OptimizerConfig
from training.engine import Hidden, Share, State, Unrolling, Update, Waiting, differentiate, name_parameters
from training.optimizer import match, sum_squares
from training.partition import Partition, connect


class DeepSpeed:
    """The engine for who trusts DeepSpeed's."""

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        shards: Mapping[str, Shard],
        mesh: Mesh,
        config: OptimizerConfig,
        zero: int,
    ) -> None:
        """``zero`` is 1 or 2. The parameters' storage moves into DeepSpeed's buffers.

        Raises ValueError for a pattern of ``optimizer.no_decay`` that matches no parameter.
        """
        self.config, self._mesh, self._stages = config, mesh, stages
        self._steps = 0  # updates applied
        named, users = name_parameters(stages)
        undecayed = match(config.no_decay, named)
        connect(mesh.device)
        alike: dict[Any, dict[str, nn.Parameter]] = {}
        for name, parameter in named.items():
            shard = shards[name]
            alike.setdefault((users[name], shard.across, shard.placement.holders, parameter.dtype), {})[name] = (
                parameter
            )
        self._partitions: list[Share[Partition]] = []
        for (of, across, *_), some in alike.items():
            # What several stages add to is summed when the last of them is finished.
            level = 1 if across or len(of) > 1 else zero
            group = mesh.holders(shards[next(iter(some))])
            partition = Partition(some, shards, group, config, undecayed, level)
            self._partitions.append(Share(of, bool(across), partition))
        self._waiting = Waiting(stages)

    def begin(self) -> None:
        """Forgets the gradients."""
        self._waiting.begin()
        for partition in self._all():
            partition.begin()

    def forward(self, stage: int, *args: Any) -> Any:
        """Calls the module of ``stage``."""
        return self._stages[stage](*args)

    def unroll(self, stage: int, *args: Any) -> Unrolling:
        """Not to be had here: hooks of modules would see half of a forward."""
        raise AssertionError("pairs that overlap are for the native engine")

    def backward(self, stage: int, loss: Tensor, hidden: Hidden = None) -> None:
        """Adds the gradients of ``loss`` and ``hidden`` to the step's; in stage 2 summed over the holders at once."""
        partitions = [partition for users, _, partition in self._partitions if stage in users]
        for partition in partitions:
            partition.enter_backward()
        differentiate(loss, hidden)
        for partition in partitions:
            partition.leave_backward()

    def accumulate(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """Not to be had here: see the head of this file."""
        raise AssertionError("weight gradients that are put off are for the native engine")

    def finishing(self, stage: int, coming: Sequence[Tensor] | None = None) -> None:
        """Nothing: what starts inside of a backward, the library starts."""

    @torch.no_grad()
    def finished(self, stage: int) -> None:
        """Stage 1 sums the gradients over the holders. Collective over the stage's ranks."""
        for partition in self._waiting.finish(stage, self._partitions):
            partition.reduce()

    @doing("optimizer")
    @torch.no_grad()
    def step(self, lr: float, finite: bool = True) -> Update:
        """Clips and updates, unless the gradient or, say the callers on all ranks, the loss is not finite."""
        grads = [grad for partition in self._all() for grad in partition.grads()]
        norm = sum_over(sum_squares(grads, self._mesh.device), self._mesh).sqrt().item()
        if not (finite and math.isfinite(norm)):
            return Update(norm, 1.0, False)
        factor = self.config.clip / norm if 0 < self.config.clip < norm else 1.0
        if factor < 1.0:
            for grad in grads:
                grad.mul_(factor)
        self._steps += 1
        for partition in self._all():
            partition.step(lr)
        return Update(norm, factor, True)

    def settle(self) -> None:
        """Nothing is on its way."""

    def state(self) -> State:
        """This rank's part of masters and moments: views, each of them on one rank only."""
        return State(self._steps, [chunk for partition in self._all() for chunk in partition.chunks()])

    def held(self) -> list[Chunk]:
        """The chunks of ``state``: no rank has what another one has."""
        return self.state().chunks

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Takes over what ``state`` gave, which covers at least what this rank owns; else raises ValueError."""
        if wrong := fill(self.state().chunks, state.chunks):
            raise ValueError(f"optimizer state does not fit the model: {', '.join(wrong[:5])}")
        self._steps = state.steps
        for partition in self._all():
            partition.publish(state.steps)

    def _all(self) -> list[Partition]:
        return [partition for _, _, partition in self._partitions]
