"""A proof's small model for a run in FP8: widths of whole tiles, and no step that an engine's rounding would decide."""

import math
from dataclasses import replace

from model.config import ModelConfig
from training.config import Precision
from training.determinism import NUMERICS
from training.proof.case import Case
from training.support import DEEPSPEED


def round_to_tiles(case: Case, precision: Precision) -> tuple[Case, list[str]]:
    """``case`` with the recipe of ``precision``, if it has one, and what is then not proved, in words."""
    recipe, topology = NUMERICS[precision].recipe, case.topology
    if recipe is None:
        return case, []
    tile, shards = recipe.activations.tile[1], topology.cp * topology.tp
    model, length = widen(case.model, topology.tp, tile), max(case.length, shards * tile)
    case = replace(case, recipe=recipe, model=model, length=length)
    if case.engine not in DEEPSPEED:
        return case, []
    said = (
        f"steps after the first: parallel.engine={case.engine} rounds weights to float32, which moves some to another "
        f"value of precision={precision}"
    )
    return replace(case, steps=1), [said]


def widen(model: ModelConfig, tp: int, tile: int) -> ModelConfig:
    """``model`` with widths that ``tp`` cuts into whole tiles: those of each head as small as that allows."""
    heads = (model.attention.kv_heads or model.attention.heads) // tp
    width = max(2, tile // math.gcd(tile, heads))
    return replace(
        model,
        hidden=tile,
        ffn=tp * tile,
        attention=replace(
            model.attention,
            q_rank=None if model.attention.q_rank is None else tile,
            kv_rank=None if model.attention.kv_rank is None else tile,
            nope_dim=width,
            rope_dim=width,
            v_dim=width,
        ),
        moe=replace(model.moe, ffn=tp * tile) if model.moe.experts else model.moe,
    )
