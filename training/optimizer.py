"""AdamW over flat buffers: one master, one gradient and two moments, each a single tensor.

Every parameter owns a slice of each buffer, at the same offset. Those that decay come first, so weight
decay is one number for each of two contiguous ranges:

    masters   | decayed parameters ............ | undecayed ... |     float32, or wider where a parameter is
    gradients | ............................... | ............. |     the same dtype
    m, v      | ............................... | ............. |     the same dtype, or bfloat16

A parameter of the masters' dtype *is* its slice; any other is a slice of one more buffer, in its own dtype,
which every step casts the masters into. With b1, b2 = beta1, beta2, t the count of updates, and g scaled so
that the norm of all gradients is at most ``clip`` (arXiv 1711.05101):

    m = b1 m + (1 - b1) g
    v = b2 v + (1 - b2) g^2
    w = (1 - lr decay) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

A parameter without a gradient in a step counts as one whose gradient is zero.

bfloat16 moments follow DeepSeek-V3, section 3.3.3, which saw no loss in them. Rounding to nearest, with 8
significant bits, holds v still once (1 - beta2) |g^2 / v - 1| is below about 2^-8: at beta2 = 0.95, v stays
within 8% of its true value and the update within 4%. With a beta above 1 - 2^-7 a moment could not even
decay towards zero, so the configuration refuses that.
"""

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.config import MomentDtype, OptimizerConfig

ALIGNMENT = 64  # elements: every slice starts on a boundary that vector and tensor-core loads like
CHUNK = 1 << 18  # elements whose narrow moments are widened at once: on a CPU they stay in the cache
DEVICE_CHUNK = 1 << 25  # the same elsewhere, for few launches
NORM_CHUNK = 1 << 16  # elements summed in the buffers' dtype; the partial sums are added in float64


class Update(NamedTuple):
    """What a step did."""

    norm: float  # gradient norm before clipping
    factor: float  # what clipping multiplied the gradient by, at most 1
    applied: bool  # False: the gradient was not finite (or the caller said so) and nothing has changed


class AdamW:
    """AdamW with master weights. A step is ``begin``, any number of backwards, ``step``."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> None:
        """Takes the named parameters over: their storage moves into the buffers and ``.grad`` stays ``None``.

        Raises ValueError for a pattern of ``optimizer.no_decay`` that matches no parameter.
        """
        self.config = config
        self.steps = 0  # updates applied, the t of the bias correction
        named = [(name, p) for name, p in parameters if p.requires_grad]
        undecayed = _match(config.no_decay, [name for name, _ in named])
        named.sort(key=lambda item: item[0] in undecayed)  # stable: each range keeps the model's order
        self._names = {parameter: name for name, parameter in named}
        self._spans: dict[nn.Parameter, tuple[int, int]] = {}
        boundary = end = 0
        for name, parameter in named:
            self._spans[parameter] = (end, end + parameter.numel())
            end += math.ceil(parameter.numel() / ALIGNMENT) * ALIGNMENT
            boundary = boundary if name in undecayed else end
        self._allocate(math.ceil(end / NORM_CHUNK) * NORM_CHUNK)
        self._chunks = [
            (slice(first, min(first + self._chunk, stop)), decay)
            for start, stop, decay in ((0, boundary, config.weight_decay), (boundary, end, 0.0))
            for first in range(start, stop, self._chunk)
        ]
        self._touched: set[nn.Parameter] = set()
        for parameter in self._spans:
            parameter.register_post_accumulate_grad_hook(self._take)

    def begin(self) -> None:
        """Forgets the gradients: the next step's start here."""
        self._touched.clear()

    @torch.no_grad()
    def accumulate(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """Adds ``grad`` (the parameter's shape, any float dtype) to the step's gradient of ``parameter``.

        The only way in: autograd's hook calls it, and so does whoever runs deferred weight gradients.
        """
        total = self._slice(self._grads, parameter)
        if parameter in self._touched:
            total.add_(grad)
        else:
            total.copy_(grad)
            self._touched.add(parameter)

    @torch.no_grad()
    def step(self, lr: float, finite: bool = True) -> Update:
        """Updates every parameter, unless the gradient or, says the caller, the loss is not finite."""
        for parameter in self._spans.keys() - self._touched:
            self._slice(self._grads, parameter).zero_()
        partial = torch.linalg.vector_norm(self._grads.view(-1, NORM_CHUNK), dim=1)
        norm = torch.linalg.vector_norm(partial, dtype=torch.float64).item()
        if not (finite and math.isfinite(norm)):
            return Update(norm, 1.0, False)
        factor = self.config.clip / norm if 0 < self.config.clip < norm else 1.0
        self.steps += 1
        for chunk, decay in self._chunks:
            self._update(chunk, lr, decay, factor)
        return Update(norm, factor, True)

    def state(self) -> dict[str, Tensor]:
        """Views named ``master/<name>``, ``m/<name>`` and ``v/<name>``, each of its parameter's shape."""
        return {
            f"{part}/{name}": self._slice(buffer, parameter)
            for part, buffer in (("master", self._masters), ("m", self._m), ("v", self._v))
            for parameter, name in self._names.items()
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Takes over what ``state`` gave after ``steps`` updates, and sets the parameters from the masters.

        Raises ValueError naming tensors that are missing, unexpected or of another shape.
        """
        own = self.state()
        wrong = sorted(own.keys() ^ state.keys()) or [n for n in own if own[n].shape != state[n].shape]
        if wrong:
            raise ValueError(f"optimizer state does not fit the model: {', '.join(wrong[:5])}")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.steps = steps
        if self._weights is not None:
            self._weights.copy_(self._masters)

    def _allocate(self, size: int) -> None:
        dtypes = {parameter.dtype for parameter in self._spans}
        master = torch.float32
        for dtype in dtypes:
            master = torch.promote_types(master, dtype)
        narrow = dtypes - {master}
        assert len(narrow) <= 1, f"parameters in more than one dtype below {master}: {narrow}"
        device = next(iter(self._spans)).device
        moment = torch.bfloat16 if self.config.moments is MomentDtype.bf16 else master
        self._masters = torch.zeros(size, dtype=master, device=device)
        self._grads = torch.zeros_like(self._masters)
        self._m, self._v = (torch.zeros(size, dtype=moment, device=device) for _ in range(2))
        # Two chunks in which narrow moments are widened; none, and no chunks, where they are as wide as the masters.
        self._chunk = size if moment == master else CHUNK if device.type == "cpu" else DEVICE_CHUNK
        widths = () if moment == master else (self._chunk, self._chunk)
        self._scratch = [torch.empty(width, dtype=master, device=device) for width in widths]
        # Has room for every parameter, also for those that are masters themselves: one copy casts a chunk.
        self._weights = torch.zeros(size, dtype=narrow.pop(), device=device) if narrow else None
        for parameter in self._spans:
            self._slice(self._masters, parameter).copy_(parameter.detach())
            if parameter.dtype == master or self._weights is None:
                parameter.data = self._slice(self._masters, parameter)
            else:
                parameter.data = self._slice(self._weights, parameter).copy_(parameter.detach())

    def _slice(self, buffer: Tensor, parameter: nn.Parameter) -> Tensor:
        start, stop = self._spans[parameter]
        return buffer[start:stop].view(parameter.shape)

    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        self.accumulate(parameter, parameter.grad)
        parameter.grad = None

    def _update(self, chunk: slice, lr: float, decay: float, factor: float) -> None:
        config = self.config
        master, grad = self._masters[chunk], self._grads[chunk]
        kept = self._m[chunk], self._v[chunk]
        m, v = (wide[: len(grad)] for wide in self._scratch) if self._scratch else kept
        if self._scratch:
            m.copy_(kept[0])
            v.copy_(kept[1])
        # The kernel divides by a scale in float32 on its way, which is exact enough for all but float64.
        scale = None if factor == 1.0 else torch.tensor(1 / factor, dtype=torch.float32, device=grad.device)
        if scale is not None and grad.dtype == torch.float64:
            grad.mul_(factor)
            scale = None
        # What torch.optim.AdamW(fused=True) calls; it has no public form that takes flat tensors.
        torch._fused_adamw_(
            [master],
            [grad],
            [m],
            [v],
            [],
            [torch.tensor(float(self.steps), device=grad.device)],
            lr=lr,
            beta1=config.beta1,
            beta2=config.beta2,
            weight_decay=decay,
            eps=config.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
        )
        if self._scratch:
            kept[0].copy_(m)
            kept[1].copy_(v)
        if self._weights is not None:
            self._weights[chunk].copy_(master)


def _match(patterns: Iterable[str], names: list[str]) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(f"optimizer.no_decay: the pattern {pattern!r} matches no parameter of the model")
        matched |= found
    return matched
