"""What a fork server loads, once for all its ranks: torch, this project's rooms, DeepSpeed with torch's compiler.

A rank alone would take seconds of a processor for that, most of them for DeepSpeed.
"""

import numpy.ma  # noqa: F401
import pytest  # noqa: F401
import small_runs  # noqa: F401
import torch._dynamo
import torch.distributed  # noqa: F401

import training.fsdp2
import training.loop
import training.native
import training.proof.prove  # noqa: F401
from training.partition import load

load("cpu")
