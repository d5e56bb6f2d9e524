"""A function as an operator of torch: what a compiler takes as a whole, and what recomputation can name.

As ``torch.library.custom_op``, whose operators load torch's compiler when first called, also where nothing is compiled:
a thousand files, and as long as the rest of torch takes. Nor does each call look whether a result is one of the tensors
that were given, or overlaps one, which no kernel may do: a test does for all of them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


def operator(
    name: str,
    mutates: Sequence[str] = (),
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates what runs on every device: it is called through torch's dispatcher from then on.

    ``name`` is "namespace::operator", its schema that of its annotations; ``mutates`` has the arguments that it writes
    to; ``backward`` and ``save`` are as for ``torch.library.register_autograd``. Without them a backward through it
    raises RuntimeError.
    """

    def define(kernel: Callable[P, R]) -> Callable[P, R]:
        schema = torch.library.infer_schema(kernel, mutates_args=mutates)
        torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, "default", kernel)
        if not mutates:  # what mutates is called inside of autograd.Functions alone
            torch.library.register_autograd(name, backward or partial(_refuse, name), setup_context=save)
        namespace, short = name.split("::")
        return cast(Callable[P, R], getattr(getattr(torch.ops, namespace), short).default)

    return define


def _refuse(name: str, *_: Any) -> None:
    raise RuntimeError(f"{name} has no gradient of its own: it belongs inside of an autograd.Function")


def register_fake(of: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates what gives results of the right shapes and dtypes, for tensors that have nothing but those."""
    return cast(Callable[[Callable[P, R]], Callable[P, R]], torch.library.register_fake(cast(Any, of)))
