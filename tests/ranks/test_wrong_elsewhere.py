"""Faults that users of other frameworks met as silently wrong numbers, each with the layout that shows it.

Every test proves its layout twice: as it is, which passes, and with that fault planted, which fails where it should.
docs/proof.md tells the story.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import make_config
from spawn import run_ranks
from torch import Tensor

from model import experts, router
from model.batch import Batch, Denominators, Losses
from model.config import MoEConfig, Recompute
from model.transformer import Transformer
from parallel.build import Shards, Stages
from parallel.config import EngineName, OverlapConfig
from parallel.mesh import Mesh
from parallel.placement import Placement
from parallel.topology import Axis, Topology
from training import microbatches
from training.config import OptimizerConfig
from training.engine import Engine
from training.native import Native
from training.optimizer import sum_squares
from training.pipeline import Runner
from training.proof import sharded
from training.proof.case import Case
from training.proof.plain import trace_plain
from training.proof.prove import prove
from training.proof.report import Report, Row

Patch = pytest.MonkeyPatch
Fault = Callable[[Patch, Mesh], None]


def make_case(topology: Topology, *, recompute: Recompute = Recompute.none, **other: Any) -> Case:
    return Case(
        topology=topology,
        model=make_config(num_layers=2, moe={"aux_alpha": 0.1}, recompute=recompute),
        optimizer=OptimizerConfig(lr=1e-3, clip=0.3),
        overlap=OverlapConfig(experts=False),  # faults are planted in what plain autograd calls
        steps=2,
        **other,
    )


def prove_both(rank: int, world: int, case: Case, fault: Fault) -> tuple[Report, Report]:
    mesh, reference = Mesh(case.topology, torch.device("cpu")), trace_plain(case)
    right = prove(case, mesh, reference)
    with pytest.MonkeyPatch.context() as patch:
        fault(patch, mesh)
        return right, prove(case, mesh, reference)


def find_failures(case: Case, fault: Fault) -> dict[str, Row]:
    """Rows that fail with the fault; without it all must pass."""
    right, wrong = run_ranks(prove_both, case.topology.world, case, fault)[0]
    assert right.passed, right
    return {row.what: row for row in wrong.rows if not row.passed}


def alter_model(patch: Patch, alter: Callable[[Transformer], None]) -> None:
    """Every stage of a sharded model is altered after it is built."""
    build = sharded.build_stages

    def build_altered(*args: Any) -> tuple[Stages, Shards]:
        stages, shards = build(*args)
        for model in stages.values():
            alter(model)
        return stages, shards

    patch.setattr(sharded, "build_stages", build_altered)


def scale_expert_gradients(patch: Patch, factor: float) -> None:
    def alter(model: Transformer) -> None:
        for name, parameter in model.named_parameters():
            if ".routed." in name:
                parameter.register_hook(lambda gradient: gradient * factor)

    alter_model(patch, alter)


def cut_gates_off(patch: Patch, mesh: Mesh) -> None:
    """The exchange hands gates on without their gradient."""
    unpermute = experts.unpermute
    patch.setattr(experts, "unpermute", lambda rows, gates, copies: unpermute(rows, gates.detach(), copies))


def test_router_gradient_under_expert_parallelism() -> None:
    failures = find_failures(make_case(Topology(dp=2, ep=2)), cut_gates_off)
    assert "router.weight" in failures["gradients"].where


def forget_tp_for_routers(patch: Patch, mesh: Mesh) -> None:
    """Each tp rank updates the routers by the gradient of its own shard of the sequence."""

    build = sharded.build_engine

    def build_wrong(name: EngineName, stages: Stages, shards: Shards, *args: Any) -> Engine:
        own = Placement(Axis.tp, 0)
        return build(
            name, stages, {n: s._replace(placement=own) if "router" in n else s for n, s in shards.items()}, *args
        )

    patch.setattr(sharded, "build_engine", build_wrong)


def test_router_weights_do_not_drift_apart_over_tensor_ranks() -> None:
    failures = find_failures(make_case(Topology(tp=2)), forget_tp_for_routers)
    assert "router.weight" in failures["replicas"].where


def double_expert_gradients(patch: Patch, mesh: Mesh) -> None:
    scale_expert_gradients(patch, mesh.degree(Axis.ep))


def test_expert_gradients_are_not_multiplied_by_the_ranks_of_their_group() -> None:
    failures = find_failures(make_case(Topology(dp=2, ep=2)), double_expert_gradients)
    assert ".routed." in failures["gradients"].where and "2 times" in failures["gradients"].where


def average_expert_gradients(patch: Patch, mesh: Mesh) -> None:
    scale_expert_gradients(patch, 1 / mesh.degree(Axis.edp))


def test_expert_gradients_have_the_scale_of_all_others() -> None:
    failures = find_failures(make_case(Topology(dp=4, ep=2), accumulation=1), average_expert_gradients)
    assert ".routed." in failures["gradients"].where and "0.5 times" in failures["gradients"].where


def skip_experts_without_tokens(patch: Patch, mesh: Mesh) -> None:
    """Experts that saw no token keep their weights: no weight decay, no step along their moments."""
    step = Native.step

    def skip(self: Native, *args: Any, **options: Any) -> Any:
        parameters = [p for m in self._stages.values() for n, p in m.named_parameters() if ".routed." in n]
        kept = [parameter.detach().clone() for parameter in parameters]
        update = step(self, *args, **options)
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter[-1] = before[-1]
        return update

    patch.setattr(Native, "step", skip)


def test_experts_without_tokens_are_updated_too() -> None:
    failures = find_failures(make_case(Topology(dp=2, ep=2), crowded=True), skip_experts_without_tokens)
    assert failures.keys() == {"weights"} and ".routed." in failures["weights"].where


def weigh_in_norm(patch: Patch, weigh: Callable[[Axis, Mesh], float]) -> None:
    """The squares of each kind of parameter enter the norm with a weight."""

    def measure(self: Native) -> float:
        total = torch.zeros((), dtype=torch.float64)
        for slab in self._slabs:
            axis = slab._entries[0].shard.placement.holders
            total += weigh(axis, self._mesh) * sum_squares([part.grad for part in slab.parts], self._mesh.device)
        dist.all_reduce(total)
        return math.sqrt(total.item())

    patch.setattr(Native, "_measure_norm", measure)


def undercount_experts(patch: Patch, mesh: Mesh) -> None:
    """Experts are taken for copies over tp, and divided by their number."""
    weigh_in_norm(patch, lambda axis, mesh: 1 / mesh.degree(Axis.tp) if axis is Axis.edp else 1.0)


def test_norm_counts_experts_folded_over_tensor_ranks() -> None:
    failures = find_failures(make_case(Topology(tp=2, ep=2)), undercount_experts)
    assert failures.keys() >= {"gradient norm", "clip factor", "weights"} and "gradients" not in failures


def count_every_copy(patch: Patch, mesh: Mesh) -> None:
    """A parameter that every rank holds counts once a rank."""
    weigh_in_norm(patch, lambda axis, mesh: float(mesh.degree(Axis.stage)) if axis is Axis.stage else 1.0)


def test_norm_counts_replicated_parameters_once() -> None:
    failures = find_failures(make_case(Topology(tp=2)), count_every_copy)
    assert failures.keys() >= {"gradient norm", "clip factor", "weights"} and "gradients" not in failures


def normalise_by_ranks(patch: Patch, mesh: Mesh) -> None:
    """The sum of exponentials is a mean over the parts of the vocabulary."""
    from parallel import loss

    reduce = loss.all_reduce

    def mean(x: Tensor, group: dist.ProcessGroup, *op: Any) -> Any:
        pending = reduce(x, group, *op)
        if op:
            return pending
        result = pending.wait()
        result[0] /= group.size()
        return type(pending)((), lambda: result)

    patch.setattr(loss, "all_reduce", mean)


def test_vocabulary_parallel_cross_entropy_is_not_off_by_the_logarithm_of_tp() -> None:
    failures = find_failures(make_case(Topology(tp=2)), normalise_by_ranks)
    assert failures.keys() >= {"loss", "cross entropy"}


def count_labels_on_every_tensor_rank(patch: Patch, mesh: Mesh) -> None:
    """Labels that count are summed over all ranks, though tp ranks read the same ones."""
    total = microbatches.sum_over
    patch.setattr(
        microbatches,
        "sum_over",
        lambda tensor, mesh, axis=Axis.world: total(tensor, mesh, Axis.stage if axis is Axis.dp else axis),
    )


def mask_by_another_shard(patch: Patch, mesh: Mesh) -> None:
    """A rank reports the losses of the tokens whose mask lies on its neighbour."""
    from parallel import loss

    apply = loss.VocabularyCrossEntropyFunction.apply

    def misplaced(hidden: Tensor, weight: Tensor, labels: Tensor, masks: Tensor, part: Any) -> Tensor:
        return apply(hidden, weight, labels, torch.stack((masks[0], masks[1].roll(len(labels) // 4))), part)

    patch.setattr(loss.VocabularyCrossEntropyFunction, "apply", misplaced)


@pytest.mark.parametrize("fault", [count_labels_on_every_tensor_rank, mask_by_another_shard])
def test_padding_is_masked_and_counted_over_the_right_ranks(fault: Fault) -> None:
    failures = find_failures(make_case(Topology(tp=2), seed=2), fault)
    assert "loss" in failures


def count_in_passing(patch: Patch, mesh: Mesh) -> None:
    """The only router counts the tokens of its experts on the way: in the forward, and again in the backward."""
    step, choose = Runner.step, router.choose
    chosen: list[Tensor] = []

    def keep(scores: Tensor, moe: MoEConfig) -> Tensor:
        chosen.append(choose(scores, moe))
        return chosen[-1]

    def step_counted(*args: Any, **options: Any) -> Any:
        chosen.clear()
        share = step(*args, **options)
        assert share is not None
        return share._replace(load=torch.cat([experts.flatten() for experts in chosen]).bincount(minlength=6)[None])

    patch.setattr(router, "choose", keep)
    patch.setattr(Runner, "step", step_counted)


@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
def test_token_counts_are_not_doubled_by_recomputation(recompute: Recompute) -> None:
    failures = find_failures(make_case(Topology(tp=2, ep=2), recompute=recompute), count_in_passing)
    assert "token counts" in failures


def average_over_the_micro_batch(patch: Patch, mesh: Mesh) -> None:
    """The auxiliary loss is a mean over the sequences of a micro-batch, and a sum of such means over the step."""

    def alter(model: Transformer) -> None:
        forward = model.forward

        def local(batch: Batch, denominators: Denominators, *rest: Any) -> Losses:
            return forward(batch, denominators._replace(sequences=float(len(batch.ids))), *rest)

        model.forward = local  # type: ignore[method-assign]

    alter_model(patch, alter)


def test_auxiliary_loss_does_not_depend_on_the_micro_batches() -> None:
    case = make_case(Topology(dp=2, ep=2), micro_batch=2, accumulation=2)
    failures = find_failures(case, average_over_the_micro_batch)
    assert failures.keys() >= {"loss", "gradients"}
