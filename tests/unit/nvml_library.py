"""Builds the library that answers as NVIDIA's does (tests/nvml/library.c), and says how a process comes to load it.

pynvml asks for libnvidia-ml.so.1 by name. A process that is started with its folder in LD_LIBRARY_PATH finds it there;
one that is under way finds it once it has loaded it itself, for the name is in the library.
"""

import ctypes
import os
import subprocess
from pathlib import Path

NAME = "libnvidia-ml.so.1"
SOURCE = Path(__file__).parents[1] / "nvml" / "library.c"


def build(folder: Path, *flags: str) -> Path:
    """The library, in ``folder``. ``-DOLD``: that of a driver some years old."""
    library = folder / NAME
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{NAME}", *flags]
    subprocess.run([*command, str(SOURCE), "-o", str(library)], check=True)
    return library


def surround(library: Path, states: Path) -> dict[str, str]:
    """The environment of a process that is to see devices as the file ``states`` has them."""
    return {**os.environ, "LD_LIBRARY_PATH": str(library.parent), "NVML_STATES": str(states)}


def load(library: Path, states: Path) -> None:
    """From now on, this process sees devices as ``states`` has them."""
    os.environ["NVML_STATES"] = str(states)
    ctypes.CDLL(str(library))
