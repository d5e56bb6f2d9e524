"""What a pipeline schedule is made of: one list of actions for each pipeline rank, and nothing else.

    F   forward            needs the stage before it      leaves activations alive
    B   backward           needs the stage after it       B = I and W at once, releases the activations
    I   input gradient     needs the stage after it       what the stage before it waits for
    W   weight gradient    needs its I                    nobody waits for it: it fills gaps; releases the activations

    rank 0   0F0 0F1 0B0 0F2 0B1 0B2        an action is written stage, op, micro-batch
    rank 1   1F0 1B0 1F1 1B1 1F2 1B2        an overlapped pair forward & backward: 1F1&1B0

Ranks here are places along the pipeline (the coordinate on Axis.pp), stages are consecutive parts of the model. Which
rank computes a stage of a micro-batch follows from the lists: two ranks that compute the same stage, each for
micro-batches of its own, hold a copy of it each.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple


class Op(StrEnum):
    """What an action computes."""

    F = "F"  # forward
    B = "B"  # full backward
    I = "I"  # input gradient
    W = "W"  # weight gradient


class Action(NamedTuple):
    """One piece of work: ``op`` of a stage for a micro-batch."""

    op: Op
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.microbatch}"


class Overlap(NamedTuple):
    """A forward and the backward (B or I) of another micro-batch, computed together: each hides the other's waits."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"{self.forward}&{self.backward}"


Compute = Action | Overlap


def parts(compute: Compute) -> tuple[Action, ...]:
    """The actions of a step: itself, or the two of a pair, forward first."""
    return (compute,) if isinstance(compute, Action) else compute


class StageMap(NamedTuple):
    """Who holds which stage: ``holders_of[stage]`` are the pipeline ranks with a copy of it, ascending."""

    holders_of: tuple[tuple[int, ...], ...]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that ``rank`` holds, ascending."""
        return tuple(stage for stage, holders in enumerate(self.holders_of) if rank in holders)


@dataclass(frozen=True)
class Schedule:
    """A pipeline's work for one step: ``lists[rank]`` is what a rank computes, in order.

    Micro-batches are numbered from 0 over the whole step, also where two directions share them.
    """

    name: str
    ranks: int
    microbatches: int
    stages: int
    lists: tuple[tuple[Compute, ...], ...]

    @cached_property
    def stage_map(self) -> StageMap:
        """The ranks that compute each stage; a stage outside ``range(stages)`` is left to the validator."""
        holders: list[list[int]] = [[] for _ in range(self.stages)]
        for rank, actions in enumerate(self.lists):
            for stage in held(actions):
                if stage < self.stages:
                    holders[stage].append(rank)
        return StageMap(tuple(map(tuple, holders)))


def held(actions: Iterable[Compute]) -> set[int]:
    """The stages that a list of actions computes."""
    return {action.stage for compute in actions for action in parts(compute)}
