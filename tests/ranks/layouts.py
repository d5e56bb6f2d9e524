"""Layouts to prove, drawn so that choices meet in pairs: what breaks is mostly two features at once.

A draw takes the best of many candidates: the one that brings most pairs of choices that no layout before it had.
Sizes follow from the choices, and divide nothing that need not be divided.
"""

import itertools
import random
from collections.abc import Iterator
from typing import Any

from small_models import SOFTMAX, make_config

from model.config import Recompute
from parallel.config import EngineName
from parallel.topology import Topology
from training.config import OptimizerConfig
from training.proof.case import Case

CHOICES: dict[str, tuple[Any, ...]] = {
    "engine": (EngineName.native, EngineName.fsdp2),
    "shared": (0, 1, 2),
    "router": ("sigmoid in groups", "sigmoid", "softmax"),
    "mtp": (0, 1, 2),
    "recompute": tuple(Recompute),
    "accumulation": (1, 2),
    "micro_batch": (1, 2),
    "crowded": (False, True),
    "rebalance": (False, True),
    "compressed": (True, False),
    "tied": (False, True),
    "dense": (0, 1),
    "documents": (True, False),
    "clip": (0.3, 0.0),
}
CANDIDATES = 50
Choice = dict[str, Any]


def draw_layouts(seed: int, count: int, ranks: range, most_tp: int) -> list[Case]:
    """``count`` cases of ``ranks`` ranks and up to ``most_tp`` ways of tp, the same for the same arguments."""
    generator, seen, cases = random.Random(seed), set[Any](), []  # noqa: S311 (no secret)
    topologies = [topology for world in ranks for topology in split(world) if topology.tp <= most_tp]
    for number in range(count):
        drawn = [draw_choice(generator, topologies) for _ in range(CANDIDATES)]
        best = max(drawn, key=lambda choice: len(pairs(choice) - seen))
        seen |= pairs(best)
        cases.append(make_case(best, number))
    return cases


def split(world: int) -> Iterator[Topology]:
    """Every topology of ``world`` ranks."""
    for tp in range(1, world + 1):
        for ep in range(1, world + 1):
            if world % tp == 0 and world % ep == 0:
                yield Topology(dp=world // tp, tp=tp, ep=ep)


def draw_choice(generator: random.Random, topologies: list[Topology]) -> Choice:
    """One of everything, but nothing that is refused."""
    choice = {name: generator.choice(values) for name, values in {"topology": topologies, **CHOICES}.items()}
    return draw_choice(generator, topologies) if is_refused(choice) else choice


def is_refused(choice: Choice) -> bool:
    """fsdp2 neither recomputes nor moves experts; without expert parallelism they have nowhere to go."""
    fsdp2 = choice["engine"] is EngineName.fsdp2
    return (fsdp2 and choice["recompute"] is not Recompute.none) or (
        choice["rebalance"] and (fsdp2 or choice["topology"].ep == 1)
    )


def pairs(choice: Choice) -> set[Any]:
    """All pairs of choices, a topology counted as what it does to each axis."""
    topology = choice["topology"]
    features = {
        **{name: value for name, value in choice.items() if name != "topology"},
        "dp": topology.dp > 1,
        "tp": topology.tp > 1,
        "ep": topology.ep > 1,
        "edp": topology.edp > 1,
        "folded": topology.ep > 1 and topology.tp > 1,
    }
    return set(itertools.combinations(sorted(features.items()), 2))


def make_case(choice: Choice, seed: int) -> Case:
    """Heads divide by tp, experts by ep and tokens by tp; widths and the vocabulary by nothing."""
    topology: Topology = choice["topology"]
    experts = next(number for number in (6, 8, 10, 14) if number % topology.ep == 0)
    grouped = choice["router"] == "sigmoid in groups"
    return Case(
        topology=topology,
        model=make_config(
            num_layers=2,
            dense_layers=choice["dense"],
            attention={
                "heads": 2 * topology.tp if topology.tp < 3 else topology.tp,
                "q_rank": 7 if choice["compressed"] else None,
            },
            moe={
                **(SOFTMAX if choice["router"] == "softmax" else {}),
                "experts": experts,
                "groups": experts // 2 if grouped else 1,
                "top_groups": 2 if grouped else 1,
                "shared_experts": choice["shared"],
                "ffn": max(5, topology.tp + 1),  # fully_shard takes no empty weights
            },
            mtp=choice["mtp"],
            tied=choice["tied"],
            recompute=choice["recompute"],
        ),
        optimizer=OptimizerConfig(lr=1e-3, clip=choice["clip"]),
        engine=choice["engine"],
        micro_batch=choice["micro_batch"],
        accumulation=max(choice["accumulation"], 3 - min(topology.dp, 2)),  # two micro-batches at least, here or there
        length=next(length for length in (8, 12, 10, 14) if length % topology.tp == 0),
        documents=choice["documents"],
        crowded=choice["crowded"],
        rebalance=choice["rebalance"],
        seed=seed,
    )


def describe(case: Case) -> str:
    """A case on one line."""
    t, model = case.topology, case.model
    words = [
        f"dp{t.dp} tp{t.tp} ep{t.ep} {case.engine} {model.moe.score}{model.moe.groups}",
        f"shared{model.moe.shared_experts}",
        f"mtp{model.mtp.depth} dense{model.dense_layers} {model.recompute} {case.accumulation}x{case.micro_batch}",
        *(word for word, true in (("crowded", case.crowded), ("moving", case.rebalance), ("tied", model.tied)) if true),
        *(("documents",) if case.documents else ()),
        *(("direct",) if model.attention.q_rank is None else ()),
        *(("clipped",) if case.optimizer.clip else ()),
    ]
    return " ".join(words)
