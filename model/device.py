"""What runs on which device: tables of functions have a row per device type, and a GPU's are kernels."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def kernel(name: str) -> Callable[..., Any]:
    """``module:function`` of model/kernels, imported when it is first called: Triton is loaded by a GPU alone."""
    module, _, function = name.partition(":")

    def call(*args: Any) -> Any:
        return getattr(import_module(f"model.kernels.{module}"), function)(*args)

    return call
