"""Engines refuse by name what they cannot do."""

import pytest

from model.config import Recompute
from parallel.config import EngineName, OverlapConfig, ParallelConfig, TensorOverlap
from training.config import Device, MomentDtype, OptimizerConfig, Precision
from training.support import check, check_overlap

ADAM = OptimizerConfig(lr=1e-3)
KEEP = Recompute.none
NARROW = OptimizerConfig(lr=1e-3, moments=MomentDtype.bf16)


@pytest.mark.parametrize("engine", EngineName)
@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp32])
def test_every_engine_trains(engine: EngineName, precision: Precision) -> None:
    check(engine, precision, ADAM, KEEP)


@pytest.mark.parametrize("engine", ["native", "fsdp2"])
def test_ours_and_torch_s_take_all(engine: str) -> None:
    check(EngineName(engine), Precision.fp64, NARROW, KEEP)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_deepspeed_refuses(engine: str) -> None:
    with pytest.raises(ValueError, match=rf"^parallel.engine={engine} must be .* precision=fp64: "):
        check(EngineName(engine), Precision.fp64, ADAM, KEEP)
    with pytest.raises(ValueError, match=rf"^optimizer.moments=bf16 must be master with parallel.engine={engine}: "):
        check(EngineName(engine), Precision.bf16, NARROW, KEEP)


@pytest.mark.parametrize("precision", [Precision.fp8, Precision.mxfp8])
def test_all_but_one_train_in_fp8(precision: Precision) -> None:
    for engine in EngineName:
        if engine is not EngineName.zero3:
            check(engine, precision, ADAM, KEEP)
    with pytest.raises(ValueError, match=rf"^parallel.engine=zero3 must be another one with precision={precision}: "):
        check(EngineName.zero3, precision, ADAM, KEEP)


def test_deepspeed_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.support.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^parallel.engine=zero1 needs DeepSpeed, which is not installed"):
        check(EngineName.zero1, Precision.bf16, ADAM, KEEP)
    check(EngineName.native, Precision.bf16, ADAM, KEEP)


def test_fully_shard_refuses_to_compute_its_units_again() -> None:
    for recompute in (Recompute.selective, Recompute.full):
        rule = rf"^model.recompute={recompute} must be none with parallel.engine=fsdp2: "
        with pytest.raises(ValueError, match=rule):
            check(EngineName.fsdp2, Precision.bf16, ADAM, recompute)


@pytest.mark.parametrize("device", [Device.cpu, Device.xpu])
def test_multiprocessors_are_left_on_gpus_of_one_kind(device: Device) -> None:
    some = ParallelConfig(overlap=OverlapConfig(multiprocessors=8))
    with pytest.raises(ValueError, match=rf"^parallel.overlap.multiprocessors=8 must be 0 with run.device={device}: "):
        check_overlap(some, device)
    check_overlap(some, Device.auto)


def test_fused_operators_are_not_for_processors() -> None:
    fused = OverlapConfig(tensor=TensorOverlap.fused)
    with pytest.raises(ValueError, match=r"^parallel.overlap.tensor=fused must be auto, joined or blocks with run.dev"):
        check_overlap(ParallelConfig(tp=2, overlap=fused), Device.cpu)
    check_overlap(ParallelConfig(tp=2, overlap=fused), Device.auto)
    check_overlap(ParallelConfig(overlap=fused), Device.cpu)
    check_overlap(ParallelConfig(tp=2), Device.cpu)
