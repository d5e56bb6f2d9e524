"""Products of matrices where a processor may lack units for BF16: then in float32, rounded once, as such units give it.

Without them a product of BF16 takes fifty times as long as one of float32 (0.9 and 55 GFLOP/s on a core with AVX2).
"""

import torch
from torch import Tensor

from model.operator import operator, register_fake

HAS_UNITS = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # of this machine's processor


def _save(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    a, b = ctx.saved_tensors
    flat = b.ndim == 2
    g_b = matmul(a.flatten(0, -2).mT, g.flatten(0, -2)) if flat else matmul(a.mT, g)
    return matmul(g, b.mT), g_b


@operator("shoestring::matmul_wide", backward=_differentiate, save=_save)
def _matmul_wide(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() @ b.float()).to(a.dtype)


@register_fake(_matmul_wide)
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def _widens(a: Tensor) -> bool:
    return not HAS_UNITS and a.dtype is torch.bfloat16 and a.device.type == "cpu"


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [..., M, K], b [..., K, N] -> [..., M, N]."""
    return _matmul_wide(a, b) if _widens(a) else a @ b


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """The same, written to ``out``."""
    if _widens(a):
        out.copy_(a.float() @ b.float())
    else:
        torch.matmul(a, b, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total`` [B, M, N] += a [B, M, K] times b [B, K, N], rounded once."""
    if _widens(a):
        total.copy_(torch.baddbmm(total.float(), a.float(), b.float()))
    else:
        total.baddbmm_(a, b)
