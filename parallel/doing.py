"""What a thread is doing, said by what it runs: to be read from another thread, and off an exception.

    @doing("step {step}", 1)             for as long as a function runs; a name in braces is one of its parameters
    with Doing("tokens of experts"):     for as long as a block does
    with Doing(waiting=True):            where it waits for another rank

    run_step > Interpreter._act > Flight.land > Pending.wait         "step 8 > 1B3 > tokens of experts", waiting

A thread's frames would tell as much. But CPython 3.11 makes objects of the frames that somebody looks at, and the
garbage collection which that may start lets the thread go on meanwhile: it does not survive every such look.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from threading import get_ident
from traceback import walk_tb
from types import TracebackType
from typing import Any, NamedTuple, ParamSpec, Self, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
NOTHING = "something that has no name"
SAID = "doing"  # the attribute of an exception that has left what was being done: words, from the outermost in


class Activity(NamedTuple):
    """What a thread does."""

    words: str  # from the outermost in
    waiting: bool  # for another rank


class Doing:
    """Something that a thread does, until it is left."""

    __slots__ = ("_stack", "value", "waiting", "words")

    def __init__(self, words: str = "", value: object = "", waiting: bool = False) -> None:
        """``value``, which may be nothing large and does not change, is written behind ``words``."""
        self.words, self.value, self.waiting = words, value, waiting

    def __enter__(self) -> Self:
        self._stack = _STACKS.setdefault(get_ident(), [])
        self._stack.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.pop()
        if error is not None and (said := str(self)):
            vars(error).setdefault(SAID, []).insert(0, said)

    def __str__(self) -> str:
        return f"{self.words}{self.value}"


_STACKS: dict[int, list[Doing]] = {}  # by thread; lists, of which others make copies in one go


def doing(words: str, shift: int = 0) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Says ``words`` while a function runs; what stands last there in braces is a parameter of its, to which ``shift``
    is added: steps are counted from 0 and told from 1.
    """
    before, _, name = words.removesuffix("}").partition("{")

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = signature(function).parameters
        place = list(parameters).index(name) if name else 0
        default = parameters[name].default if name else ""

        @wraps(function)
        def told(*args: P.args, **kwargs: P.kwargs) -> R:
            value: Any = default
            if name:
                value = args[place] if len(args) > place else kwargs.get(name, default)
            with Doing(before, value + shift if shift else value):
                return function(*args, **kwargs)

        return told

    return decorate


def read(thread: int) -> Activity:
    """Of any ``thread``, as it is just now."""
    stack = list(_STACKS.get(thread, ()))
    words = " > ".join(filter(None, map(str, stack)))
    return Activity(words or NOTHING, bool(stack) and stack[-1].waiting)


def read_error(error: BaseException) -> str:
    """What was being done when ``error`` was raised; where nothing said so, the function that it was raised in."""
    frame = next((frame for frame, _ in reversed(list(walk_tb(error.__traceback__)))), None)
    where = f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_qualname}" if frame else NOTHING
    return " > ".join(vars(error).get(SAID, [])) or where
