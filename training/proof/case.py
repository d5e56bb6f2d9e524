"""What is proved: a layout, a model, and batches that leave no fault a place to hide.

    sequence 0 of 4   every label counts
             1 of 4   none does
             2 of 4   only labels in the first half do: with tp, a rank's whole shard is padding
             3 of 4   some do

so that micro-batches, data-parallel ranks and shards of a sequence all differ in how much they count.
Shapes: N sequences a step, S tokens a sequence, D depth of multi-token prediction.
"""

from dataclasses import dataclass, field

import torch

from model.batch import Batch
from model.build import Transformer, constant
from model.config import ModelConfig
from model.fp8 import Recipe
from parallel.config import EngineName, OverlapConfig, ParallelConfig, PipelineConfig
from parallel.mesh import Mesh
from parallel.pipeline.plan import Pipeline, divide_model, schedule_of
from parallel.topology import Axis, Topology
from training.config import OptimizerConfig
from training.ramp import BatchSchedule, Level


@dataclass(frozen=True, slots=True)
class Case:
    """One proof. The model is small: every rank computes the plain run for itself."""

    topology: Topology
    model: ModelConfig
    optimizer: OptimizerConfig
    recipe: Recipe | None = None  # of products in FP8, rounding and all
    engine: EngineName = EngineName.native
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    micro_batch: int = 1  # sequences a rank reads at once
    accumulation: int = 2  # micro-batches a step
    length: int = 8  # S
    documents: bool = True  # tokens attend within documents
    crowded: bool = False  # every token goes to the first experts; the others get none
    rebalance: bool = False  # experts change ranks after every step; for engines that move them
    steps: int = 3
    seed: int = 0

    @property
    def sequences(self) -> int:
        """Sequences of a step, N. With several micro-batches of several sequences, the last is one short."""
        short = self.micro_batch > 1 and self.accumulation > 1
        return self.topology.dp * (self.micro_batch * self.accumulation - short)

    @property
    def parallel(self) -> ParallelConfig:
        """What a runner reads."""
        t = self.topology
        return ParallelConfig(
            pp=t.pp, dp=t.dp, tp=t.tp, ep=t.ep, pipeline=self.pipeline, overlap=self.overlap, engine=self.engine
        )

    @property
    def stages(self) -> Pipeline:
        """Which layers are a stage, and who has it."""
        return divide_model(self.parallel, self.model, schedule_of(self.parallel, self.accumulation))

    @property
    def schedule(self) -> BatchSchedule:
        """Every step takes as many sequences."""
        return BatchSchedule((Level(0, 0, self.sequences),))


def draw_batch(case: Case, step: int) -> Batch:
    """The global batch of a step: ids [N, S + 1 + D]."""
    generator = torch.Generator().manual_seed(1000 * case.seed + step)
    size = (case.sequences, case.length + 1 + case.model.mtp.depth)
    ids = torch.randint(case.model.vocab_size, size, generator=generator)
    counted = torch.rand(size, generator=generator) < 0.6
    kinds = (torch.arange(size[0]) + case.seed + step) % 4
    counted[kinds == 0] = True
    counted[kinds == 1] = False
    counted[kinds == 2] = torch.arange(size[1]) <= case.length // 2
    starts = torch.rand((case.sequences, case.length), generator=generator) < 0.3
    return Batch(ids, counted, starts.cumsum(1).int() if case.documents else None)


@torch.no_grad()
def disturb(case: Case, model: Transformer) -> None:
    """Makes every parameter of a fresh plain model show in its loss: norms leave one, biases leave zero."""
    generator = torch.Generator().manual_seed(case.seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if constant(name, tensor) is not None:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor += (0.2 * noise).to(tensor.dtype)
    if case.crowded:
        for router in model.routers():
            # Scores lie between 0 and 1: these experts come first, whatever the token.
            router.bias[: case.model.moe.top_k] += 10


def place_sequences(case: Case, replica: int, step: int) -> list[slice]:
    """Where the sequences of the micro-batches of a rank, by its place in dp, lie in the global batch of a step."""
    schedule, first = case.schedule, case.schedule.before(step)
    plan = schedule.plan(step, case.micro_batch, case.topology.dp, replica)
    return [slice(at - first, at - first + count) for at, count in plan]


def share_batch(case: Case, mesh: Mesh, step: int) -> list[Batch]:
    """This rank's micro-batches."""
    ids, counted, documents = draw_batch(case, step)
    return [
        Batch(ids[place], counted[place], None if documents is None else documents[place])
        for place in place_sequences(case, mesh.coordinate(Axis.dp), step)
    ]
