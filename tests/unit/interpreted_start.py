"""Triton's interpreter in a process of its own: whether kernels are interpreted is settled when Triton is imported.

test ---- Interpreter.run("interpreted_gather:check_numbers", ...) ---> worker, TRITON_INTERPRET=1
                                                                          |  fork, memory shared
                                                                   rank 0, rank 1 ... where a check has ranks
"""

import importlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from functools import partial, partialmethod
from typing import Any

LIMIT = 100.0  # seconds for a check


class Interpreter:
    """A worker that runs checks one after the other, and raises here what they raise there."""

    def __init__(self) -> None:
        self._start()

    def run(self, name: str, *args: Any) -> None:
        """``name`` is module:function. A check that takes too long costs the worker its life."""
        self._end.send((name, args))
        if not self._end.poll(LIMIT):
            self._process.kill()
            self._start()
            raise TimeoutError(f"{name} after {LIMIT:g} s")
        error = self._end.recv()
        assert error is None, error

    def close(self) -> None:
        self._end.close()
        self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._end, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,))
        self._process.start()
        theirs.close()


def serve(end: Any) -> None:
    """The worker's life: until the other end is closed."""
    prepare()
    while True:
        try:
            name, args = end.recv()
        except EOFError:
            return
        end.send(caught(call, name, *args))


def call(name: str, *args: Any) -> None:
    module, _, function = name.partition(":")
    getattr(importlib.import_module(module), function)(*args)


def caught(function: Callable[..., None], *args: Any) -> str | None:
    """The traceback of what ``function`` raises."""
    try:
        function(*args)
    except BaseException:
        return traceback.format_exc()
    return None


def prepare() -> None:
    """Before anything imports Triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from triton.runtime import interpreter

    torch.set_num_threads(1)  # which also makes forking safe
    for name in ("create_dot", "create_fp_to_fp", "cast_impl"):
        plain = getattr(interpreter.InterpreterBuilder, name)
        setattr(interpreter.InterpreterBuilder, name, partialmethod(globals()[name], plain))
    interpreter._patch_lang_core = partial(patch_lang_core, interpreter._patch_lang_core)


def create_dot(builder: Any, plain: Callable[..., Any], a: Any, b: Any, *rest: Any) -> Any:
    """Triton's interpreter would multiply bfloat16 as the integers in which it keeps them."""
    import triton.language as tl

    wide = (x if x.dtype.scalar == tl.float32 else builder.cast_impl(x, tl.float32) for x in (a, b))
    return plain(builder, *wide, *rest)


def create_fp_to_fp(builder: Any, plain: Callable[..., Any], x: Any, kind: Any, rounding: Any) -> Any:
    """Its own way to 8 bits and back."""
    import triton.language as tl

    known = tl.float32 in (x.dtype.scalar, kind.scalar)
    return builder.cast_impl(x, kind) if known else plain(builder, x, kind, rounding)


def cast_impl(builder: Any, plain: Callable[..., Any], x: Any, kind: Any) -> Any:
    """It would cut float32 to bfloat16, and round to 8 bits away from the nearest. Both it keeps as integers."""
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    narrow = {
        tl.bfloat16: (torch.bfloat16, torch.int16, "uint16"),
        tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, "uint8"),
        tl.float8e4b8: (torch.float8_e4m3fnuz, torch.uint8, "uint8"),
    }
    if x.dtype.scalar == tl.float32 and kind.scalar in narrow:
        dtype, bits, view = narrow[kind.scalar]
        return TensorHandle(torch.tensor(x.data).to(dtype).view(bits).numpy().view(view), kind.scalar)
    if x.dtype.scalar in narrow and kind.scalar == tl.float32:
        dtype, bits, _ = narrow[x.dtype.scalar]
        same = torch.tensor(x.data.view(str(bits).removeprefix("torch.")))
        return TensorHandle(same.view(dtype).float().numpy(), tl.float32)
    return plain(builder, x, kind)


def patch_lang_core(plain: Callable[..., None], language: Any, scope: Any) -> None:
    """In Triton 3.7 it would know no type of 8 bits that is gfx942's."""
    plain(language, scope)
    known = language.dtype.to_ir

    def to_ir(kind: Any, builder: Any) -> Any:
        return builder.get_fp8e4b8_ty() if kind.name == "fp8e4b8" else known(kind, builder)

    scope.set_attr(language.dtype, "to_ir", to_ir)


def run_ranks(world: int, function: Callable[..., None], *args: Any) -> None:
    """``function(rank, *args)`` in forked processes: tensors in shared memory have one address in all of them."""
    context = multiprocessing.get_context("fork")
    ends = [context.Pipe(duplex=False) for _ in range(world)]
    processes = [
        context.Process(target=_rank, args=(rank, ends[rank][1], function, args), daemon=True) for rank in range(world)
    ]
    try:
        for process in processes:
            process.start()
        deadline = time.monotonic() + LIMIT / 2
        for rank, (end, _) in enumerate(ends):
            assert end.poll(max(0.0, deadline - time.monotonic())), f"rank {rank} waits for ever"
            error = end.recv()
            assert error is None, error
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(rank: int, end: Any, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    end.send(caught(function, rank, *args))
