"""Collectives whose results no proof compares: what each is there for, as a promise that a rank can check.

Two ranks, dp=2 and ep=2. A promise returns whether this rank saw it kept; it is kept if all ranks say so.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from breaks import Break, planted
from neighbours import NEAR, NEAR_PROMISED
from sites import Site
from small_models import make_config
from small_runs import make_run

from configs.schema import TrainConfig
from model.batch import Denominators, count_labels
from model.build import build, outline
from parallel.config import EngineName, ParallelConfig
from parallel.exchange import find_exchanges, take_travelled
from parallel.locality import Travel
from parallel.mesh import Mesh, connect, disconnect
from parallel.topology import Axis, Topology
from training.agree import tell, wait_for_all
from training.checkpoint.folders import FOLDER, locate
from training.checkpoint.keeper import Keeper
from training.checkpoint.resume import resume
from training.checkpoint.state import Progress
from training.config import Precision
from training.evaluate import count_sequences, evaluate
from training.finish import Ending
from training.gather import gather_whole, name_tensors
from training.health.fingerprint import CorruptionError, Fingerprints
from training.ledger import open_ledger
from training.metrics import Record
from training.microbatches import total_travel
from training.placer import Placer
from training.profile import Profile
from training.sets import open_shared_sets
from training.setup import Setup, set_up
from training.steps import run_steps
from training.text import open_shared_text
from training.watchers import watch

PATIENCE = 1.0  # seconds that rank 0 keeps others waiting for


class Stand(NamedTuple):
    """What a promise is checked on."""

    setup: Setup
    folder: Path  # of its own, the same on all ranks


def stop_together(stand: Stand) -> bool:
    """When one rank is asked to stop, none takes another step."""
    rank, progress = stand.setup.mesh.rank, Progress()
    with (
        open_ledger(stand.folder, False, 2, 0.0) as ledger,
        Record(stand.folder / f"{rank}.jsonl") as record,
        watch(stand.setup, progress, stand.folder, record, ledger) as watchers,
    ):
        watchers.interrupt.asked = rank == 1
        outcome = run_steps(stand.setup, progress, watchers)
    return outcome.ending is Ending.interrupted and outcome.last is None


def hear_everybody(stand: Stand) -> bool:
    """What one rank has to say, all hear."""
    return tell(stand.setup.mesh, "a word" if stand.setup.mesh.rank == 1 else "") == ["a word"]


def compare_together(stand: Stand) -> bool:
    """Where holders of a weight have different ones, all of them know, and which weight it is."""
    fingerprints = Fingerprints(stand.setup, 1)
    fingerprints.take(1)  # all are alike
    weight = next(stand.setup.stages[0].parameters())
    if stand.setup.mesh.rank == 1:
        weight.detach().view(-1)[3] += 1
    try:
        fingerprints.take(2)
    except CorruptionError as error:
        return "ranks 0, 1: weight/embedding.weight is not the same on all" in str(error)
    return False


def give_up_together(stand: Stand) -> bool:
    """Where one rank cannot write, there is no checkpoint, and all know why."""
    notes: list[str] = []
    folder = locate(stand.folder / FOLDER, 1)
    if stand.setup.mesh.rank == 1:
        folder.mkdir(parents=True, exist_ok=True)  # another rank may be writing already
        (folder / "00001.safetensors").symlink_to("/dev/full")
    try:
        save(stand, 1, notes)
    except OSError:
        return False
    gone = stand.setup.mesh.rank == 1 or not folder.exists()
    return gone and "rank 1: [Errno 28] No space left on device" in "".join(notes)


def go_back_together(stand: Stand) -> bool:
    """Where one rank finds its file damaged, all take the checkpoint before."""
    root = stand.folder / FOLDER
    for step in (1, 2):
        save(stand, step, [])
    if stand.setup.mesh.rank == 1:
        os.truncate(locate(root, 2) / "00001.safetensors", 2000)
    found = resume(stand.setup, stand.folder, lambda line: None)
    return found is not None and found[0].step == 1


def refuse_together(stand: Stand) -> bool:
    """Where rank 0 finds nothing but damaged checkpoints, no rank begins again."""
    if stand.setup.mesh.rank == 0:
        (stand.folder / FOLDER / "00000003.damaged").mkdir(parents=True)
    try:
        resume(stand.setup, stand.folder, lambda line: None)
    except ValueError:
        return True
    return False


def save(stand: Stand, step: int, notes: list[str]) -> None:
    """A checkpoint, to its end."""
    with Record(stand.folder / f"{stand.setup.mesh.rank}.jsonl") as record:
        keeper = Keeper(stand.setup, stand.folder, record, notes.append, 0, Fingerprints(stand.setup, 0).expect)
        keeper.save(Progress(step=step))
        keeper.settle()


def measure_the_whole_split(stand: Stand) -> bool:
    """An evaluation gives the loss of the plain model on all its sequences."""
    config, held_out = stand.setup.config, stand.setup.text.held_out
    batch = held_out.read(0, count_sequences(held_out, config.run.eval_tokens))
    plain = build(config.model, torch.float64, "cpu", config.run.seed)
    depth = config.model.mtp.depth
    total = plain(batch, Denominators((1.0,) * (1 + depth), 1.0)).sums[0].item()
    return math.isclose(evaluate(stand.setup), total / count_labels(batch, depth)[0], rel_tol=1e-12)


def gather_the_plain_weights(stand: Stand) -> bool:
    """Rank 0 gets every tensor of the plain model."""
    setup = stand.setup
    plain = name_tensors([build(setup.config.model, torch.float64, "cpu", setup.config.run.seed)])
    gathered = dict(
        gather_whole(
            setup.stages, setup.shards, setup.runner.pipeline, outline(setup.config.model, torch.float64), setup.mesh
        )
    )
    return setup.mesh.rank != 0 or all(torch.equal(gathered[name], tensor) for name, tensor in plain.items())


def count_all_travel(stand: Stand) -> bool:
    """How far tokens travelled is the sum of what all ranks saw."""
    setup, rank = stand.setup, stand.setup.mesh.rank
    batch, everyone = setup.text.train.read(2 * rank, 2), [torch.empty(0)] * setup.mesh.topology.world
    denominators = Denominators((1.0,) * (1 + setup.config.model.mtp.depth), 1.0)
    setup.engine.forward(0, batch, denominators)
    dist.all_gather_object(everyone, take_travelled(setup.stages.values(), setup.mesh))
    setup.engine.forward(0, batch, denominators)
    return total_travel(setup.stages.values(), setup.mesh) == Travel(*torch.stack(everyone).sum(0).tolist())


def count_the_moved(stand: Stand) -> bool:
    """What is reported of a move is how many experts are on another rank than before."""
    setup, moe = stand.setup, stand.setup.config.model.moe
    exchanges, each = find_exchanges(setup.stages.values()).values(), moe.experts // setup.mesh.degree(Axis.ep)
    ranks = [exchange.places // each for exchange in exchanges]
    placer = Placer(setup.stages, setup.shards, setup.engine, setup.average, setup.mesh, every=1)
    load = torch.where(torch.arange(moe.experts) < each, 100, 1)  # the first rank has all the work
    reported = placer.take(load.expand(len(setup.config.model.routed_blocks()), -1))
    changed = (exchange.places // each != before for exchange, before in zip(exchanges, ranks, strict=True))
    return reported == sum(int(moved.sum()) for moved in changed) > 0


def wait_for_the_last(stand: Stand) -> bool:
    """Nobody goes on before all are there."""
    return stay_together(stand, lambda: wait_for_all(stand.setup.mesh))


def open_what_rank_0_prepared(stand: Stand) -> bool:
    """No rank opens the text before rank 0 has."""
    return stay_together(stand, lambda: open_shared_text(stand.setup.config, print, stand.setup.mesh))


def open_the_sets_that_rank_0_prepared(stand: Stand) -> bool:
    """No rank opens a text to be measured before rank 0 has."""
    return stay_together(stand, lambda: open_shared_sets(stand.setup.config, {}, print, stand.setup.mesh))


def begin_profiles_together(stand: Stand) -> bool:
    """No rank takes a step that is to be profiled before all can."""
    profile = make_profile(stand)
    kept = stay_together(stand, lambda: take_a_step(profile))
    profile.close()
    return kept


def join_what_all_have_seen(stand: Stand) -> bool:
    """No rank goes on, and rank 0 does not join profiles, before all are written."""
    profile = make_profile(stand)
    take_a_step(profile)
    return stay_together(stand, profile.close)


def make_profile(stand: Stand) -> Profile:
    """Of the first two steps."""
    stand.setup.config.profile.steps = "1-2"
    return Profile(stand.setup, stand.folder, lambda line: None)


def take_a_step(profile: Profile) -> None:
    """One in which nothing happens."""
    with profile.around(0):
        pass


def leave_together(stand: Stand) -> bool:
    """Nobody leaves the group before all do."""
    kept = stay_together(stand, disconnect)
    mesh = stand.setup.mesh
    connect(mesh.device, mesh.rank, mesh.topology.world, stand.folder / "again")
    return kept


def stay_together(stand: Stand, call: Callable[[], object]) -> bool:
    """Whether ``call`` returns on rank 1 only once rank 0, which is late, has made it too."""
    returned = stand.folder / "returned"
    if stand.setup.mesh.rank == 1:
        call()
        returned.touch()
        return True
    deadline = time.monotonic() + PATIENCE
    while not returned.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    early = returned.exists()
    call()
    return not early


PROMISES: dict[str, Callable[[Stand], bool]] = {
    "stop": stop_together,
    "hear": hear_everybody,
    "compare": compare_together,
    "give up": give_up_together,
    "go back": go_back_together,
    "refuse": refuse_together,
    "evaluate": measure_the_whole_split,
    "gather": gather_the_plain_weights,
    "gather stages": gather_the_plain_weights,
    "travel": count_all_travel,
    "moved": count_the_moved,
    "wait": wait_for_the_last,
    "open": open_what_rank_0_prepared,
    "open sets": open_the_sets_that_rank_0_prepared,
    "begin": begin_profiles_together,
    "join": join_what_all_have_seen,
    "leave": leave_together,
    **NEAR,
}
AGREE, EVALUATE, COLLECT = "training/agree.py", "training/evaluate.py", "training/gather.py"
WAIT, OPEN = Site(AGREE, "wait_for_all", "any_rank"), Site("training/text.py", "open_shared_text", "wait_for_all")
SETS = Site("training/sets.py", "open_shared_sets", "wait_for_all")
BEGIN, JOIN = (Site("training/profile.py", f"Profile.{of}", "wait_for_all") for of in ("_begin", "close"))
LEAVE = Site("parallel/mesh.py", "disconnect", "dist.barrier")
STOP, SIGNS = Site("training/steps.py", "run_steps", "agree"), Site(AGREE, "agree", "sum_over")
HEAR, ANYTHING, WORDS = (
    Site(AGREE, "any_rank", "sum_over"),
    Site(AGREE, "tell", "any_rank"),
    Site(AGREE, "tell", "sum_over"),
)
KEEPER, RESUME = "training/checkpoint/keeper.py", "training/checkpoint/resume.py"
SETTLE, REASONS = Site(KEEPER, "Keeper.settle", "agree"), Site(KEEPER, "Keeper._give_up", "tell")
NEWEST, DAMAGE, REFUSAL = Site(RESUME, "_newest", "sum_over"), *(Site(RESUME, "resume", "tell", n) for n in (0, 1))
COMPARE = Site("training/health/fingerprint.py", "compare_holders", "all_gather")
LABELS, LOSS = (Site(EVALUATE, "Evaluator.measure", "sum_over", index) for index in range(2))
TRAVELLED = Site("training/microbatches.py", "total_travel", "sum_over")
MOVED = Site("training/placer.py", "Placer.take", "sum_over")
SEND, RECEIVE = Site(COLLECT, "_collect", "dist.send"), Site(COLLECT, "_collect", "dist.recv")
BRING, FETCH = Site(COLLECT, "_bring", "dist.send"), Site(COLLECT, "_bring", "dist.recv")
PROMISED = [
    *NEAR_PROMISED,
    *(Break(site, "unheard", how="stop") for site in (STOP, SIGNS)),
    *(Break(site, "unheard", how="hear") for site in (HEAR, ANYTHING, WORDS)),
    *(Break(site, "unheard", how="give up") for site in (SETTLE, REASONS)),
    *(Break(site, "unheard", how="go back") for site in (NEWEST, DAMAGE)),
    Break(REFUSAL, "unheard", how="refuse"),
    Break(COMPARE, "skipped", how="compare"),
    *(Break(site, kind, how="evaluate") for site in (LABELS, LOSS) for kind in ("own alone", "counted twice")),
    *(Break(TRAVELLED, kind, how="travel") for kind in ("own alone", "counted twice")),
    Break(SEND, "sent wrong", how="gather"),
    Break(RECEIVE, "received nothing", how="gather"),
    Break(BRING, "sent wrong", how="gather stages"),
    Break(FETCH, "received nothing", how="gather stages"),
    *(Break(MOVED, kind, how="moved") for kind in ("own alone", "counted twice")),
    Break(WAIT, "unheard", how="wait"),
    Break(OPEN, "unheard", how="open"),
    Break(SETS, "unheard", how="open sets"),
    Break(BEGIN, "unheard", how="begin"),
    Break(JOIN, "unheard", how="join"),
    Break(LEAVE, "left alone", how="leave"),
]


LAYOUTS = {"gather stages": Topology(pp=2)}  # other layouts than two replicas that share experts
SPREAD = Topology(dp=2, ep=2)


def make(folder: Path, engine: EngineName = EngineName.native, layout: Topology = SPREAD) -> TrainConfig:
    """A step of 4 sequences, and an evaluation of 5 in rounds of 4."""
    config = make_run(
        folder,
        model=make_config(vocab_size=264, mtp=1),
        precision=Precision.fp64,
        **{"steps": 1, "global_batch": 4, "micro_batch": 2, "eval_tokens": 5 * 16},
    )
    return replace(config, parallel=ParallelConfig(pp=layout.pp, dp=layout.dp, ep=layout.ep, engine=engine))


def keep(rank: int, world: int, breaks: list[Break], folder: Path) -> dict[Break, tuple[bool, int]]:
    """Whether this rank saw the promise kept while each break was planted, and how often the broken call was made."""
    kept = {}
    for number, broken in enumerate(breaks):
        layout = LAYOUTS.get(broken.how, SPREAD)
        setup = set_up(make(folder, layout=layout), lambda line: None, Mesh(layout, torch.device("cpu")))
        stand = Stand(setup, folder / str(number))
        stand.folder.mkdir(exist_ok=True)
        wait_for_all(setup.mesh)
        with planted(broken, setup.mesh) as hits:
            kept[broken] = (PROMISES[broken.how](stand), len(hits))
    return kept
