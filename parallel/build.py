"""A rank's part of a model, with the values that the whole model has there: nothing else is ever in memory."""

from model.build import initialise, materialise, outline
from model.config import ModelConfig
from model.precision import Numerics
from model.transformer import Transformer
from parallel.config import OverlapConfig
from parallel.mesh import Mesh
from parallel.parallelize import parallelize
from parallel.pipeline.stages import Pipeline, whole
from parallel.placement import Shard, place
from parallel.plan import plan_transformer
from parallel.topology import Axis

Stages = dict[int, Transformer]
Shards = dict[str, Shard]


def allocate_stages(
    config: ModelConfig, numerics: Numerics, mesh: Mesh, pipeline: Pipeline, overlap: OverlapConfig
) -> tuple[Stages, Shards]:
    """The stages of this rank without values, and what part of the whole each of their parameters is.

    A parameter of two stages is one tensor. Raises ValueError for an ``overlap`` that there is nothing for here.
    """
    names = [name for name, _ in outline(config, numerics.dtype).named_parameters()]
    placements = place(plan_transformer(config), names)
    stages: Stages = {}
    shards: Shards = {}
    for stage in pipeline.stage_map.stages_of(mesh.coordinate(Axis.pp)):
        model = outline(config, numerics.dtype, pipeline.layers[stage], numerics.recipe)
        shards |= parallelize(model, placements, mesh, overlap)
        stages[stage] = materialise(model, mesh.device)
        for other in stages.values():
            share_embedding(other, model)
    for name, shard in shards.items():
        across = pipeline.across(name, config)
        shards[name] = shard._replace(across=across if len(across) > 1 else ())
    return stages, shards


def build_stages(
    config: ModelConfig, numerics: Numerics, seed: int, mesh: Mesh, pipeline: Pipeline, overlap: OverlapConfig
) -> tuple[Stages, Shards]:
    """Stages ready to train: on every layout the values are those of ``model.build.build`` with the same seed."""
    stages, shards = allocate_stages(config, numerics, mesh, pipeline, overlap)
    for model in stages.values():
        initialise(model, seed, {name: (shard.global_shape, shard.slices) for name, shard in shards.items()})
    return stages, shards


def build_sharded(
    config: ModelConfig, numerics: Numerics, seed: int, mesh: Mesh, overlap: OverlapConfig | None = None
) -> tuple[Transformer, Shards]:
    """``build_stages`` where there is a single stage."""
    stages, shards = build_stages(config, numerics, seed, mesh, whole(config), overlap or OverlapConfig())
    return stages[0], shards


def share_embedding(one: Transformer, other: Transformer) -> None:
    """Two stages of a rank that both have the embedding have it once."""
    if one is not other and hasattr(one, "embedding") and hasattr(other, "embedding"):
        other.embedding.weight = one.embedding.weight
