"""Which layers make a stage, and which pipeline ranks hold a parameter.

    layers   0 1 2 | 3 4 5 | 6 7 | 8 + norm, head, MTP     uneven, so that stages cost the same: the head weighs as well

Layers keep their numbers and names. The embedding belongs to the first stage, and to the last as well where a tied head
or multi-token prediction reads it there: one parameter of two stages. Where those lie on one rank (a V) it is there
once; where they lie on two, the two hold it together, as two ranks do that hold copies of a stage (DualPipe). All of
that is ``across``.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from model.config import ModelConfig
from model.count import count, count_layer
from parallel.pipeline.action import StageMap


class Pipeline(NamedTuple):
    """The layers of every stage, and the pipeline ranks that hold it."""

    layers: tuple[range, ...]
    stage_map: StageMap

    def stages_of(self, name: str, config: ModelConfig) -> tuple[int, ...]:
        """The stages that have the parameter ``name``, ascending."""
        last = len(self.layers) - 1
        part, _, rest = name.partition(".")
        if part == "layers":
            layer = int(rest.partition(".")[0])
            return (next(stage for stage, layers in enumerate(self.layers) if layer in layers),)
        if part != "embedding":
            return (last,)
        return tuple(sorted({0, last})) if config.tied or config.mtp.depth else (0,)

    def across(self, name: str, config: ModelConfig) -> tuple[int, ...]:
        """The pipeline ranks that hold the parameter ``name``, ascending."""
        holders_of = self.stage_map.holders_of
        return tuple(sorted({rank for stage in self.stages_of(name, config) for rank in holders_of[stage]}))

    def names_of(self, rank: int, names: Iterable[str], config: ModelConfig) -> set[str]:
        """Those of ``names`` that pipeline rank ``rank`` holds."""
        return {name for name in names if rank in self.across(name, config)}

    def shared(self, config: ModelConfig) -> set[tuple[int, ...]]:
        """Every set of several pipeline ranks that hold a parameter together."""
        names = ["embedding.weight", "norm.weight", *(f"layers.{layers.start}.any" for layers in self.layers)]
        return {across for name in names if len(across := self.across(name, config)) > 1}


ALONE = StageMap(((0,),))


def whole(config: ModelConfig) -> Pipeline:
    """One stage with everything."""
    return Pipeline((range(config.num_layers),), ALONE)


def divide(config: ModelConfig, stages: int, sizes: Sequence[int] | None = None) -> tuple[range, ...]:
    """The layers of each of ``stages`` stages: ``sizes`` of them, or such that the dearest stage is as cheap as can be.

    Raises ValueError, naming parallel.pipeline.layers, for sizes that are not those of a division.
    """
    if sizes is None:
        if stages > config.num_layers:
            raise ValueError(
                f"model.num_layers={config.num_layers} must be at least the number of pipeline stages, {stages}: lower "
                "parallel.pp or parallel.pipeline.virtual"
            )
        sizes = _balance(*price(config), stages)
    elif len(sizes) != stages or min(sizes) < 1 or sum(sizes) != config.num_layers:
        raise ValueError(
            f"parallel.pipeline.layers=[{','.join(map(str, sizes))}] must be {stages} numbers of layers, one a stage, "
            f"each at least 1 and together model.num_layers={config.num_layers}"
        )
    ends = list(accumulate(sizes))
    return tuple(range(end - size, end) for end, size in zip(ends, sizes, strict=True))


def price(config: ModelConfig) -> tuple[list[int], int]:
    """Weights that a token is multiplied with: in each layer, and at the end, in the head and in MTP."""
    parts = count(config)
    layers = [count_layer(config, layer).multiplied for layer in range(config.num_layers)]
    return layers, parts.head.multiplied + parts.mtp.multiplied


def weigh(config: ModelConfig, layers: Sequence[range]) -> list[float]:
    """The share of each stage in the cost of the model, of stages that have these ``layers``."""
    costs, end = price(config)
    costs[-1] += end
    return [sum(costs[layer] for layer in held) / sum(costs) for held in layers]


def _balance(costs: list[int], end: int, stages: int) -> list[int]:
    """Layers a stage, each at least one: the dearest stage costs least, and with that the sum of squares is least."""
    costs = [*costs[:-1], costs[-1] + end]
    total = [0, *accumulate(costs)]
    limit = _best(total, stages, lambda before, cost: max(before, cost))[0]
    even = _best(total, stages, lambda before, cost: before + cost**2 if cost <= limit else math.inf)[1]
    return even


def _best(total: list[int], stages: int, join: Callable[[float, int], float]) -> tuple[float, list[int]]:
    """The division of layers with least value, and the value; ``total[i]``: the cost of the first i layers.

    ``join`` adds a stage's cost to the value of those before.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0, [])}  # by the number of layers divided so far
    for left in range(stages - 1, -1, -1):
        best = {
            stop: min(
                (join(value, total[stop] - total[first]), [*sizes, stop - first])
                for first, (value, sizes) in best.items()
                if first < stop
            )
            for stop in range(stages - left, len(total) - left)
        }
    return best[len(total) - 1]
