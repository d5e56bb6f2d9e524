"""Whether compute segments go through torch.compile: where it can, and where the run is long enough to pay for it.

pays  if   (1 - 1 / gain) * FLOPs of the run / eager FLOP/s  >  seconds spent compiling
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from configs.schema import TrainConfig
from model.count import flops_per_token
from parallel.config import EngineName
from parallel.pipeline.plan import splits_backward
from training.support import Compile, check_compile


class Price(NamedTuple):
    """What compiling costs and gives on a kind of device, roughly: it decides, it promises nothing."""

    seconds: float
    gain: float  # compiled over eager speed
    eager: float  # model FLOP/s of the eager run


PRICES = {"cpu": Price(60.0, 1.3, 1e11), "accelerator": Price(90.0, 1.5, 1e14)}


def decide_compile(config: TrainConfig, device_type: str) -> tuple[bool, str]:
    """Whether to compile for ``device_type`` ("cpu", "cuda", ...), and why, in a line.

    Raises ValueError where ``run.compile=on`` and something that compiling needs is missing, or that it cannot take.
    """
    if config.run.compile is Compile.off:
        return False, "eager: run.compile=off"
    engine = config.parallel.engine
    if engine is not EngineName.native:
        if config.run.compile is Compile.on:
            raise ValueError(f"run.compile=on needs parallel.engine=native; {engine} takes modules over as they are")
        return False, f"eager: parallel.engine={engine}"
    if splits_backward(config.parallel):
        name = config.parallel.pipeline.file or config.parallel.schedule
        check_compile(config.run.compile, f"the schedule {name}", splits=True)
        return False, f"eager: {name} splits backwards"
    missing = _find_missing(device_type)
    if config.run.compile is Compile.on:
        if missing:
            raise ValueError(f"run.compile=on needs {missing}; install it or set run.compile=off")
        return True, "compiled: run.compile=on"
    if missing:
        return False, f"eager: compiling needs {missing}"
    price = PRICES["cpu" if device_type == "cpu" else "accelerator"]
    length = config.data.sequence_length
    tokens = config.run.steps * config.run.global_batch * length
    seconds = flops_per_token(config.model, length) * tokens / price.eager
    saved = (1 - 1 / price.gain) * seconds
    what = f"would save about {saved:.0f} s of {seconds:.0f} s and takes about {price.seconds:.0f} s"
    return saved > price.seconds, f"{'compiled' if saved > price.seconds else 'eager'}: compiling {what}"


def _find_missing(device_type: str) -> str | None:
    """What torch.compile needs here and does not find."""
    if device_type != "cpu":
        return None if importlib.util.find_spec("triton") else "triton"
    # The compiler that torch looks for.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"a C++ compiler ({compiler})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's C headers (Python.h)"
    return None
