"""What benchmarks/overlap.py measures: steps and operations that send something, on ranks that can also only compute.

Experts     a step of a model asleep (benchmarks/waiting.py); its exchanges of tokens, programs, schedule are real
Awake       a step of the same schedule whose computation is real, too
Gradients   a step of such a model and the native engine, which sums gradients and copies new weights
Products    a gather or a sum of tensor parallelism, and the product beside it
"""

from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from benchmarks.tensor import Product, nothing, wait
from benchmarks.waiting import Asleep, Naps, Seconds, put_to_sleep
from model.batch import Batch, Denominators
from model.block import Block
from model.config import AttentionConfig, ModelConfig, MoEConfig
from model.exchange import LocalExchange
from model.precision import Numerics
from parallel.build import build_stages
from parallel.collective_matmul import MATMULS, Operation
from parallel.config import OverlapConfig, ParallelConfig, PipelineConfig, ScheduleName
from parallel.mesh import Axis, Mesh
from parallel.pipeline.idle import Sleeper
from parallel.pipeline.plan import divide_model, schedule_of
from parallel.placement import REPLICATED, Placement, Shard
from parallel.topology import Topology
from training.config import OptimizerConfig
from training.engine import differentiate, unroll_stage
from training.native import Native
from training.pipeline import Runner, shape_activations

TOKENS, HIDDEN, EXPERTS = 512, 512, 8
OWN = Placement(Axis.ep)


class Trial(Protocol):
    """A rank's part; all ranks call it together."""

    calibrated: bool  # whether computation lasts as long as it is told

    def take(self, way: str | None, unit: float) -> float:
        """Seconds of it, where a unit of computation lasts ``unit``; without a ``way`` nothing is sent."""


class Layout(NamedTuple):
    """Ranks and what they do in a step."""

    pp: int
    ep: int
    schedule: str
    layers: int
    microbatches: int


class Variant(NamedTuple):
    """A way to take the step."""

    overlap: bool
    pieces: int = 1
    shared: bool = False  # a third of the experts' time is shared experts'


class Bare:
    """Stands where an engine would, without gradients to keep."""

    def __init__(self, stages: Mapping[int, Any]) -> None:
        self._stages = stages

    def forward(self, stage: int, *args: Any) -> Any:
        return self._stages[stage](*args)

    def unroll(self, stage: int, *args: Any) -> Any:
        return unroll_stage(self._stages[stage], *args)

    def backward(self, stage: int, loss: Any, hidden: Any = None) -> None:
        differentiate(loss, hidden)

    def accumulate(self, parameter: Any, grad: Any) -> None:
        pass

    def finishing(self, stage: int, coming: Any = None) -> None:
        pass

    def finished(self, stage: int) -> None:
        pass


class Model:
    """The stages of a rank of ``layout``, its schedule, and as many micro-batches as that takes."""

    def __init__(self, layout: Layout, config: ModelConfig) -> None:
        self.config, self.topology = config, Topology(pp=layout.pp, dp=layout.ep, ep=layout.ep)
        self.mesh = Mesh(self.topology, torch.device("cpu"))
        pipeline = PipelineConfig(schedule=ScheduleName(layout.schedule))
        parallel = ParallelConfig(pp=layout.pp, dp=layout.ep, ep=layout.ep, pipeline=pipeline)
        arranged = divide_model(parallel, config, schedule_of(parallel, layout.microbatches))
        self.mesh.share(arranged.shared(config))
        self.stages, _ = build_stages(config, Numerics(torch.bfloat16), 0, self.mesh, arranged, OverlapConfig())
        self.runner = Runner(
            parallel, arranged, shape_activations(config, TOKENS, torch.bfloat16, self.mesh), self.mesh
        )
        generator = torch.Generator().manual_seed(self.mesh.rank)
        ids = torch.randint(config.vocab_size, (layout.microbatches, 1, TOKENS + 1), generator=generator)
        self.batches = [Batch(each, torch.ones_like(each, dtype=torch.bool), None) for each in ids]
        self.routed = [b for model in self.stages.values() for b in model.modules() if isinstance(b, Block)]
        self.exchanges = [block.exchange for block in self.routed]

    def cut(self, pieces: int) -> None:
        """From now on tokens go in so many pieces."""
        for exchange in self.exchanges:
            assert exchange is not None
            exchange.pieces = pieces

    def step(self, engine: Any, overlap: bool) -> float:
        """Seconds of a step's forwards and backwards."""
        self.runner._mode = self.runner._mode._replace(overlap=overlap)
        dist.barrier()
        began = perf_counter()
        self.runner.step(engine, self.batches, Denominators((float(TOKENS),), 1.0))
        return perf_counter() - began


def small(layers: int) -> ModelConfig:
    """What surrounds blocks that are asleep, as small as it can be."""
    return ModelConfig(
        name="asleep", vocab_size=16, num_layers=layers, hidden=HIDDEN, ffn=16, dense_layers=0,
        attention=AttentionConfig(heads=1, kv_rank=8, nope_dim=8, rope_dim=8, v_dim=8),
        moe=MoEConfig(experts=EXPERTS, top_k=2, ffn=8, shared_experts=1, aux_alpha=0.0),
    )  # fmt: skip


class Experts:
    """Steps of a layout whose blocks sleep. A unit: the forward of a segment."""

    calibrated = True

    def __init__(self, layout: Layout, variants: Mapping[str, Variant]) -> None:
        self._variants, self._model = variants, Model(layout, small(layout.layers))
        sleeper = Sleeper()
        self._naps = Naps(Seconds(sleeper), Seconds(sleeper), Seconds(sleeper))

    def take(self, way: str | None, unit: float) -> float:
        """See ``Trial``."""
        model, sends = self._model, way is not None
        variant = self._variants[way] if way is not None else Variant(False)
        for stage in model.stages.values():
            put_to_sleep(stage, self._naps, TOKENS, model.mesh.rank, variant.pieces)
        for block, exchange in zip(model.routed, model.exchanges, strict=True):
            block.exchange = exchange if sends else LocalExchange(EXPERTS, 1)
        model.cut(variant.pieces)
        shared = unit / 3 if variant.shared else 0.0
        self._naps.attention.value, self._naps.experts.value, self._naps.shared.value = unit, unit - shared, shared
        return model.step(Bare(model.stages), variant.overlap)


class Awake:
    """Steps of a layout that computes; communication alone is that of its twin, asleep.

    Without links that have limits a step still sends, so what is called computation has some of that in it.
    """

    calibrated = False

    def __init__(self, layout: Layout, variants: Mapping[str, Variant]) -> None:
        config = ModelConfig(
            name="awake", vocab_size=256, num_layers=layout.layers, hidden=HIDDEN, ffn=16, dense_layers=0,
            attention=AttentionConfig(heads=8, kv_rank=128, nope_dim=64, rope_dim=32, v_dim=64),
            moe=MoEConfig(experts=EXPERTS, top_k=2, ffn=1024, shared_experts=1, aux_alpha=0.0),
        )  # fmt: skip
        self._asleep = Experts(layout, variants)
        self._model, self._variants, self._first = Model(layout, config), variants, next(iter(variants))
        # Sums of gradients are another trial's.
        self._engine = Native(self._model.stages, keep(self._model), self._model.mesh, OptimizerConfig(lr=1e-3))

    def take(self, way: str | None, unit: float) -> float:
        """See ``Trial``."""
        if not unit:
            return self._asleep.take(way, unit)
        variant = self._variants[way or self._first]
        self._model.cut(variant.pieces)
        self._engine.begin()
        return self._model.step(self._engine, variant.overlap)


class Prompt(Native):
    """The native engine, waiting for whatever it starts."""

    def finishing(self, stage: int, coming: Any = None) -> None:
        """No sum starts early."""

    def finished(self, stage: int) -> None:
        """See ``Engine``."""
        super().finished(stage)
        self.settle()

    def step(self, lr: float, finite: bool = True) -> Any:
        """See ``Engine``."""
        update = super().step(lr, finite)
        self.settle()
        return update


class Gradients:
    """Steps of data parallelism over all ranks: each layer has two weights of ``elements``, and a segment a unit.

    With nothing to send, every rank has its own.
    """

    calibrated = True

    def __init__(self, layers: int, ranks: int, elements: int) -> None:
        self._naps = Naps(*(Seconds(Sleeper()) for _ in range(3)))
        self._engines: dict[str | None, Any] = {}
        self._models: dict[str | None, Model] = {}
        layout = Layout(1, ranks, "1f1b", layers, 1)
        for way, engine in ((None, Native), ("in turns", Prompt), ("beside", Native)):
            model = self._models[way] = Model(layout, small(layers))
            for block in model.routed:
                block.exchange = LocalExchange(EXPERTS, 1)
            put_to_sleep(model.stages[0], self._naps, TOKENS, model.mesh.rank)
            for part in model.stages[0].modules():
                if isinstance(part, Asleep):
                    part.weight = torch.nn.Parameter(torch.zeros(elements, dtype=torch.bfloat16))
            shards = keep(model) if way is None else share(model)
            config = OptimizerConfig(lr=1e-3, bucket_bytes=2 * elements, no_decay=())
            self._engines[way] = engine(model.stages, shards, model.mesh, config)

    def take(self, way: str | None, unit: float) -> float:
        """See ``Trial``; one of two steps, the first of which has had one before it."""
        engine, model = self._engines[way], self._models[way]
        for nap in self._naps:
            nap.value = unit
        for number in range(3):
            if number == 1:
                dist.barrier()
                began = perf_counter()
            engine.begin()
            model.step(engine, False)
            engine.step(1e-3)
        dist.barrier()
        taken = (perf_counter() - began) / 2
        engine.settle()
        return taken


def keep(model: Model) -> dict[str, Shard]:
    """Of parameters that each rank has for itself, as if experts were in them."""
    world, rank = model.mesh.topology.world, model.mesh.rank
    return {
        name: Shard(
            (world * p.shape[0], *p.shape[1:]), (rank * p.shape[0], *(0 for _ in p.shape[1:])), (*p.shape,), OWN
        )
        for stage in model.stages.values()
        for name, p in stage.named_parameters()
    }


def share(model: Model) -> dict[str, Shard]:
    """Of parameters that all ranks hold."""
    return {
        name: Shard((*p.shape,), (0,) * p.dim(), (*p.shape,), REPLICATED)
        for stage in model.stages.values()
        for name, p in stage.named_parameters()
    }


class Products:
    """A gather and the product of what it brings, or a product and its sum; a unit: the product of all rows."""

    calibrated = True
    rows, inner, outer = 1024, 1024, 2048

    def __init__(self, name: str) -> None:
        group = dist.group.WORLD
        assert group is not None
        x = torch.zeros(1, self.rows, self.inner if name == "gather" else self.outer, dtype=torch.bfloat16)
        weight = torch.zeros(x.shape[2], self.outer if name == "gather" else self.inner, dtype=torch.bfloat16)
        out = x.new_empty(self.rows, weight.shape[1])
        given = x[:, : self.rows // group.size()].clone() if name == "gather" else x
        self._alone: Callable[[Product], object] = lambda product: product(x[0], weight, out)
        self._ways = {
            way: partial(getattr(MATMULS[way], name), [given], [weight], group)
            for way in (Operation.joined, Operation.blocks)
        }

    def take(self, way: str | None, unit: float) -> float:
        """See ``Trial``."""
        product = partial(wait, unit, self.rows) if unit else nothing
        call = self._alone if way is None else self._ways[Operation(way)]
        dist.barrier()
        began = perf_counter()
        call(product)
        return perf_counter() - began
