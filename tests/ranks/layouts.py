"""Layouts to prove, drawn so that choices meet in pairs: what breaks is mostly two features at once.

A draw takes the best of many candidates: the one that brings most pairs of choices that no layout before it had.
Sizes follow from the choices, and divide nothing that need not be divided.

Layouts with several stages draw a schedule as well, and how layers are divided, by ``PIPED`` instead of ``CHOICES``.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from small_models import GROUPED, SOFTMAX, make_config

from model.config import AttentionConfig, MoEConfig, Recompute, ScoreFunction
from parallel.config import EngineName, OverlapConfig, PipelineConfig, TensorOverlap
from parallel.pipeline.schedules import SCHEDULES, Route, check
from parallel.topology import Topology
from training.config import OptimizerConfig
from training.proof.case import Case

CHOICES: dict[str, tuple[Any, ...]] = {
    "engine": (EngineName.native, EngineName.fsdp2),
    "tensor": (TensorOverlap.joined, TensorOverlap.blocks),
    "shared": (0, 1, 2),
    "router": ("sigmoid in groups", "sigmoid", "softmax", "softmax, normalised", "none"),
    "mtp": (0, 1, 2),
    "recompute": tuple(Recompute),
    "accumulation": (1, 2, 3),
    "micro_batch": (1, 2),
    "crowded": (False, True),
    "rebalance": (False, True),
    "attention": ("latent", "direct", "grouped", "biased"),
    "tied": (False, True),
    "dense": (0, 1, "every other"),
    "documents": (True, False),
    "clip": (0.3, 0.0),
    "schedule": ("1f1b", "interleaved_1f1b_overlap"),
    "pieces": (1, 2, 3),
    "overlapped": (True, False),
}
ONE_STAGE = {"virtual": 1, "divided": "by cost", "spare": 1}  # and dense layers beside a routed one
PIPED: dict[str, tuple[Any, ...]] = {
    **CHOICES,
    "accumulation": (3, 4, 5, 8),
    "schedule": tuple(SCHEDULES),
    "virtual": (1, 2, 3),
    "divided": ("by cost", "as drawn"),
    "spare": (0, 1, 2),  # layers more than stages
}
CANDIDATES = 50
# Of so many ranks of tp: latent as DeepSeek's; grouped as Qwen3's, a head of keys and values a rank; as GLM-4.5's.
ATTENTION: dict[str, Callable[[int], dict[str, Any]]] = {
    "latent": lambda tp: {"heads": 2 * tp if tp < 3 else tp, "q_rank": 7},
    "direct": lambda tp: {"heads": 2 * tp if tp < 3 else tp, "q_rank": None},
    "grouped": lambda tp: GROUPED | {"heads": 3 * tp, "kv_heads": tp, "qk_norm": True},
    "biased": lambda tp: GROUPED | {"heads": 4 * tp, "kv_heads": 2 * tp, "nope_dim": 4, "rope_dim": 4, "bias": True},
}
Choice = dict[str, Any]


def draw_layouts(seed: int, count: int, ranks: range, most_tp: int, stages: range | None = None) -> list[Case]:
    """``count`` cases of ``ranks`` ranks and up to ``most_tp`` ways of tp, the same for the same arguments.

    ``stages``: over how many ranks their pipelines go; without it there are none. Pipelines have several stages, if
    need be on one rank.
    """
    generator, seen, cases = random.Random(seed), set[Any](), []  # noqa: S311 (no secret)
    topologies = [t for world in ranks for t in split(world) if t.tp <= most_tp and t.pp in (stages or (1,))]
    options = PIPED if stages else CHOICES
    for number in range(count):
        drawn = [draw_choice(generator, topologies, options) for _ in range(CANDIDATES)]
        best = max(drawn, key=lambda choice: len(pairs(choice) - seen))
        seen |= pairs(best)
        cases.append(make_case(best, number))
    return cases


def split(world: int) -> Iterator[Topology]:
    """Every topology of ``world`` ranks."""
    degrees = range(1, world + 1)
    for pp, tp, ep in itertools.product(degrees, repeat=3):
        if world % (pp * tp) == 0 and world // pp % ep == 0:
            yield Topology(pp=pp, dp=world // (pp * tp), tp=tp, ep=ep)


def draw_choice(
    generator: random.Random, topologies: list[Topology], options: Mapping[str, tuple[Any, ...]] = CHOICES
) -> Choice:
    """One of everything, but nothing that is refused."""
    while True:
        choice = {name: generator.choice(values) for name, values in {"topology": topologies, **options}.items()}
        if "virtual" in choice and not SCHEDULES[choice["schedule"]].virtual:
            choice["virtual"] = 1
        if not is_refused(choice) and not ("virtual" in choice and is_no_pipeline(choice)):
            return choice


def is_refused(choice: Choice) -> bool:
    """fsdp2 neither recomputes nor moves experts, takes schedules of whole backwards only, and on one rank one stage;
    without expert parallelism experts have nowhere to go, and tokens stay together; without experts none are routed."""
    if choice["router"] == "none" and (choice["topology"].ep > 1 or choice["crowded"] or choice["rebalance"]):
        return True
    topology, fsdp2 = choice["topology"], choice["engine"] is EngineName.fsdp2
    wild = bool(SCHEDULES[choice["schedule"]].needs_native()) or choice.get("virtual", 1) > topology.pp == 1
    return (fsdp2 and (choice["recompute"] is not Recompute.none or wild)) or (
        (choice["rebalance"] and fsdp2) or (topology.ep == 1 and (choice["rebalance"] or choice["pieces"] > 1))
    )


def is_no_pipeline(choice: Choice) -> bool:
    """A schedule has its rules; experts of which two ranks have copies stay; one stage alone is no pipeline."""
    ranks = choice["topology"].pp
    generator = SCHEDULES[choice["schedule"]]
    try:
        check(choice["schedule"], ranks, choice["accumulation"], choice["virtual"])
    except ValueError:
        return True
    copies = generator.placement is Route.bidirectional
    return (copies and choice["rebalance"]) or generator.stages(ranks, choice["virtual"]) == 1


def pairs(choice: Choice) -> set[Any]:
    """All pairs of choices, a topology counted as what it does to each axis."""
    topology = choice["topology"]
    features = {
        "pp": topology.pp,
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
    choice = {**ONE_STAGE, **choice}
    topology: Topology = choice["topology"]
    stages = SCHEDULES[choice["schedule"]].stages(topology.pp, choice["virtual"])
    layers = stages + choice["spare"]
    experts = next(number for number in (6, 8, 10, 14) if number % topology.ep == 0)
    grouped, every_other = choice["router"] == "sigmoid in groups", choice["dense"] == "every other"
    return Case(
        topology=topology,
        model=make_config(
            num_layers=layers,
            dense_layers=0 if every_other else choice["dense"],
            attention=ATTENTION[choice["attention"]](topology.tp),
            moe={
                **(SOFTMAX if choice["router"].startswith("softmax") else {}),
                "normalize_gates": choice["router"] != "softmax",
                "experts": 0 if choice["router"] == "none" else experts,
                "every": 2 if every_other else 1,
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
        pipeline=PipelineConfig(
            schedule=choice["schedule"],
            virtual=choice["virtual"],
            layers=divide(layers, stages, seed) if choice["divided"] == "as drawn" else None,
        ),
        overlap=OverlapConfig(experts=choice["overlapped"], pieces=choice["pieces"], tensor=choice["tensor"]),
        micro_batch=choice["micro_batch"],
        accumulation=max(choice["accumulation"], 3 - min(topology.dp, 2)),  # two micro-batches at least, here or there
        length=next(length for length in (8, 12, 10, 14) if length % topology.tp == 0),
        documents=choice["documents"],
        crowded=choice["crowded"],
        rebalance=choice["rebalance"],
        steps=2,  # the second starts from what the first has made: weights, biases, moments, moved experts
        seed=seed,
    )


def divide(layers: int, stages: int, seed: int) -> list[int]:
    """So many layers a stage, at least one."""
    generator = random.Random(seed)  # noqa: S311 (no secret)
    ends = [0, *sorted(generator.sample(range(1, layers), stages - 1)), layers]
    return [end - start for start, end in itertools.pairwise(ends)]


def describe(case: Case) -> str:
    """A case on one line."""
    t, model, pipeline = case.topology, case.model, case.pipeline
    layers = "" if pipeline.layers is None else f" {pipeline.layers}"
    words = [
        f"pp{t.pp} {pipeline.schedule}{pipeline.virtual}{layers}{'' if case.overlap.experts else ' in turns'}",
        f"dp{t.dp} tp{t.tp} ep{t.ep} {case.overlap.tensor} {case.engine} {describe_router(model.moe)}",
        f"shared{model.moe.shared_experts}",
        f"mtp{model.mtp.depth} dense{model.dense_layers}/{model.moe.every} {model.recompute}",
        f"{case.accumulation}x{case.micro_batch}",
        *(word for word, true in (("crowded", case.crowded), ("moving", case.rebalance), ("tied", model.tied)) if true),
        *((f"{case.overlap.pieces} pieces",) if case.overlap.pieces > 1 else ()),
        *(("documents",) if case.documents else ()),
        describe_attention(model.attention),
        *(("clipped",) if case.optimizer.clip else ()),
    ]
    return " ".join(words)


def describe_router(moe: MoEConfig) -> str:
    """As in ``CHOICES``."""
    if not moe.experts:
        return "none"
    normalised = ", normalised" * (moe.score is ScoreFunction.softmax and moe.normalize_gates)
    return moe.score + normalised + " in groups" * (moe.groups > 1)


def describe_attention(attention: AttentionConfig) -> str:
    """As in ``CHOICES``."""
    if attention.kv_heads is None:
        return "direct" if attention.q_rank is None else "latent"
    return "biased" if attention.bias else "grouped"
