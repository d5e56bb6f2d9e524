"""AdamW over flat tensors, the norm of flat gradients, and which parameters decay. Who owns them: training/native.py.

With b1, b2 = beta1, beta2, t the count of updates, and g scaled so that the norm of all gradients is at most ``clip``
(arXiv 1711.05101):

    m = b1 m + (1 - b1) g
    v = b2 v + (1 - b2) g^2
    w = (1 - lr decay) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

A parameter without a gradient in a step counts as one whose gradient is zero.

bfloat16 moments follow DeepSeek-V3, section 3.3.3, which saw no loss in them. Rounding to nearest, with 8
significant bits, holds v still once (1 - beta2) |g^2 / v - 1| is below about 2^-8: at beta2 = 0.95, v stays
within 8% of its true value and the update within 4%. With a beta above 1 - 2^-7 a moment could not even
decay towards zero, so the configuration refuses that.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.config import OptimizerConfig

CHUNK = 1 << 18  # elements whose narrow moments are widened at once: on a CPU they stay in the cache
DEVICE_CHUNK = 1 << 25  # the same elsewhere, for few launches
VECTOR = 64  # elements: more than any vector register holds
NORM_CHUNK = 1 << 16  # elements summed in their own dtype; the partial sums are added in float64


class Part(NamedTuple):
    """Flat tensors of equal length: some weights, and what updating them takes."""

    master: Tensor  # float32, or wider
    grad: Tensor  # the same dtype
    m: Tensor  # the same dtype, or bfloat16
    v: Tensor  # like m
    weight: Tensor | None  # what the model computes with; None: the master itself
    decay: float

    def cut(self, start: int, stop: int) -> "Part":
        """Its elements from ``start`` to ``stop``."""
        return Part(
            self.master[start:stop],
            self.grad[start:stop],
            self.m[start:stop],
            self.v[start:stop],
            None if self.weight is None else self.weight[start:stop],
            self.decay,
        )


def update(part: Part, config: OptimizerConfig, steps: int, lr: float, factor: float) -> None:
    """The update number ``steps`` (from 1) of a part, its gradient multiplied by ``factor``."""
    length = len(part.master)
    if not length:
        return
    if part.m.dtype == part.master.dtype:
        _update(part, config, steps, lr, factor)
        if part.weight is not None:
            part.weight.copy_(part.master)
        return
    size = min(length, CHUNK if part.master.device.type == "cpu" else DEVICE_CHUNK)
    scratch = torch.empty(2, size, dtype=part.master.dtype, device=part.master.device)
    for start in range(0, length, size):
        chunk = part.cut(start, min(start + size, length))
        m, v = (wide[: len(chunk.master)] for wide in scratch)
        m.copy_(chunk.m)
        v.copy_(chunk.v)
        _update(chunk._replace(m=m, v=v), config, steps, lr, factor)
        chunk.m.copy_(m)
        chunk.v.copy_(v)
        if chunk.weight is not None:
            chunk.weight.copy_(chunk.master)


def _update(part: Part, config: OptimizerConfig, steps: int, lr: float, factor: float) -> None:
    # The kernel rounds the last few elements of a tensor, which fill no vector register, otherwise than the others. In
    # a copy that is filled up they are like the others, so that cutting tensors elsewhere changes no bit.
    whole = len(part.master) // VECTOR * VECTOR
    if whole == len(part.master):
        return _launch([part], config, steps, lr, factor)
    tail = part.cut(whole, len(part.master))
    filled = Part(_fill(tail.master), _fill(tail.grad), _fill(tail.m), _fill(tail.v), None, part.decay)
    _launch([part.cut(0, whole), filled], config, steps, lr, factor)
    for ours, updated in ((tail.master, filled.master), (tail.m, filled.m), (tail.v, filled.v)):
        ours.copy_(updated[: len(ours)])


def _fill(tensor: Tensor) -> Tensor:
    return nn.functional.pad(tensor, (0, VECTOR - len(tensor)))


def _launch(pieces: Sequence[Part], config: OptimizerConfig, steps: int, lr: float, factor: float) -> None:
    device, wide = pieces[0].grad.device, pieces[0].grad.dtype == torch.float64
    # The kernel divides by a scale in float32 on its way, which is exact enough for all but float64.
    scale = None if factor == 1.0 or wide else torch.tensor(1 / factor, dtype=torch.float32, device=device)
    if wide and factor != 1.0:
        for piece in pieces:
            piece.grad.mul_(factor)
    # What torch.optim.AdamW(fused=True) calls; it has no public form that takes flat tensors.
    torch._fused_adamw_(
        [piece.master for piece in pieces],
        [piece.grad for piece in pieces],
        [piece.m for piece in pieces],
        [piece.v for piece in pieces],
        [],
        [torch.tensor(float(steps), device=device) for _ in pieces],
        lr=lr,
        beta1=config.beta1,
        beta2=config.beta2,
        weight_decay=pieces[0].decay,
        eps=config.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=scale,
    )


def sum_squares(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of the squares of flat tensors, a float64 scalar on ``device``."""
    norms = [torch.zeros(1, dtype=torch.float64, device=device)]
    for grad in grads:
        whole = len(grad) // NORM_CHUNK * NORM_CHUNK
        if whole:
            norms.append(torch.linalg.vector_norm(grad[:whole].view(-1, NORM_CHUNK), dim=1).double())
        if whole < len(grad):
            norms.append(torch.linalg.vector_norm(grad[whole:])[None].double())
    return torch.cat(norms).square().sum()


def match(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """The ``names`` that ``optimizer.no_decay`` excepts. ValueError for a pattern that matches none."""
    known, matched = list(names), set()
    for pattern in patterns:
        found = {name for name in known if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(f"optimizer.no_decay: the pattern {pattern!r} matches no parameter of the model")
        matched |= found
    return matched
