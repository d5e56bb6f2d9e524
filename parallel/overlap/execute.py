"""The executor: programs of a rank in turns, each up to its next wait, so that one computes while another sends.

    backward   | experts of B, sends ->               | attention of B, sends ->                |
    forward    |          attention of F, sends ->    |          experts of F, sends ->         |
    weights    |                          W W         |                         W W             |

The order is static: it follows from the programs alone, never from what has arrived first, so that all ranks of a
group start the same collectives in the same order. It is that of DualPipe (DeepSeek-V3, arXiv 2412.19437, figure 4):
the backward goes first, so that each of a pair's four exchanges has a computation of the other micro-batch above it.
What is left to fill, before an exchange is waited for, are weight gradients that were put off:
parallel/overlap/backlog.py.
"""

from collections.abc import Sequence
from typing import Any

from parallel.overlap.program import Program


def interleave(programs: Sequence[Program[Any]]) -> list[Any]:
    """Runs ``programs`` in turns to their ends; gives what they return, in their order."""
    made: list[Any] = [None] * len(programs)
    running = dict(enumerate(programs))
    while running:
        for place, program in list(running.items()):
            try:
                next(program)
            except StopIteration as end:
                made[place] = end.value
                del running[place]
    return made
