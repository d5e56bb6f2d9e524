"""Checks every machine of a run before its first step, and says who is unfit. Every rank calls it alike.

    check_machines    before there is a process group: devices, products, memory, disk, clocks, versions
    check_network     once there is a mesh: the collectives of every axis, and machines two by two
    conclude          the table; then by preflight.on_failure: stop, warn, or exclude

Ranks measure, rank 0 judges (launcher/preflight/judge.py), all hear of it (launcher/preflight/desk.py).
"""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.preflight import OnFailure, When
from configs.schema import RunConfig
from launcher.preflight import measure
from launcher.preflight.desk import Desk, find_leaders, name_node
from launcher.preflight.judge import Sample
from launcher.preflight.unfit import UnfitError, exclude
from launcher.preflight.verdict import Scale, Verdict, reach

if TYPE_CHECKING:
    from torch.distributed import Store

    from launcher.discover import Rank
    from parallel.mesh import Mesh


Samples = dict[str, list[Sample]]
SPELLS = 4  # of products, at most


def open_preflight(config: RunConfig, rank: "Rank", store: "Store", folder: Path) -> "Preflight | None":
    """The checks of a run in ``folder``, whose ranks meet in ``store``; None where none are due."""
    from torch.distributed import PrefixStore

    from training.determinism import choose_device

    device = choose_device(config.run.device)
    when = config.preflight.when
    # What every rank knows alike: whether all of them are on one machine, and what kind of device they compute on.
    due = rank.here < rank.world or device.type != "cpu" if when is When.auto else when is not When.never
    if not due:
        return None
    desk = Desk(PrefixStore("preflight", store), rank.rank, rank.world, rank.local, rank.here, name_node(os.environ))
    return Preflight(config, desk, device.type, folder)


class Preflight:
    """The checks of one run, as one of its ranks goes through them. All ranks call the same methods in this order."""

    def __init__(self, config: RunConfig, desk: Desk, kind: str, folder: Path) -> None:
        """``kind``: of device."""
        self._config, self._desk, self._kind, self._folder = config, desk, kind, folder
        self._started = time.monotonic()
        self._samples: Samples = {}  # on rank 0
        self._nodes: list[str] = []  # of each rank
        self._leaders: list[int] = []  # the first rank of each machine

    def check_machines(self) -> None:
        """Measures what needs no process group. Raises UnfitError where the run is not to start."""
        desk = self._desk
        who = desk.gather("node", [desk.node, desk.local])
        self._nodes, locals_ = desk.tell("nodes", [list(each) for each in zip(*who, strict=True)])
        self._leaders = find_leaders(locals_)
        rows = list(measure.read_machine(self._find_disk())) if desk.leads else []
        rows += measure.read_clock(desk, self._leaders)
        self._samples = self._gather("machine", rows)
        self._measure_products()
        self._conclude("machines", last=False)

    def _measure_products(self) -> None:
        """All at the same time, as in a step; again while any is slow, up to ``SPELLS`` times, of which a rank's best
        counts: what else a machine did for a moment is not to be its fault."""
        desk, best, machine = self._desk, 0.0, self._samples
        for spell in range(SPELLS):
            desk.meet(f"products {spell}")
            speed, rows = measure.read_product(desk, self._choose_device(), self._config.run.threads)
            best = max(best, speed)
            found = self._gather(f"products {spell}", [("product", f"rank {desk.rank}", best), *rows])
            self._samples = machine | found
            slow = desk.rank == 0 and any(finding.check == "product" for finding in self._reach().findings)
            if not desk.tell(f"slow {spell}", slow):
                return

    def check_network(self, mesh: "Mesh | None") -> None:
        """Measures what goes between ranks; None: there is one alone. Says what was found. Raises UnfitError where the
        run is not to start."""
        if mesh is not None:
            self._measure_network(mesh)
        self._conclude("network", last=True)

    def _measure_network(self, mesh: "Mesh") -> None:
        from launcher.preflight import network, probe

        desk = self._desk
        axes = desk.gather("axes", list(probe.read_axes(mesh)))
        links = desk.gather("links", list(probe.read_links(mesh, self._leaders)))
        self._samples |= network.join_groups([row for rows in axes for row in rows], self._nodes, self._kind)
        self._samples |= network.join_links([row for rows in links for row in rows], self._nodes)

    @property
    def alone(self) -> bool:
        """Whether nothing is to be trained."""
        return self._config.preflight.when is When.alone

    def _gather(self, name: str, rows: list[measure.Row]) -> Samples:
        """On rank 0, what all ranks have measured, by the name of its check; nothing on others."""
        samples: Samples = {}
        for node, theirs in zip(self._nodes, self._desk.gather(name, rows), strict=False):
            for check, subject, value in theirs:
                samples.setdefault(check, []).append(Sample((node,), subject, value))
        return samples

    def _reach(self) -> Verdict:
        """On what rank 0 knows."""
        return reach(self._config, Scale(self._desk.world, self._desk.here, self._kind), self._samples)

    def _conclude(self, what: str, last: bool) -> None:
        """Rank 0 judges what is known, and every rank does what is to come of it: at the ``last`` time, or at once."""
        desk = self._desk
        found = self._judge(last) if desk.rank == 0 else None
        refused = desk.tell(f"verdict of {what}", found)
        if refused is not None:
            desk.leave(what)
            raise UnfitError(refused)

    def _judge(self, last: bool) -> str | None:
        """Why the run is not to start; None where it is. Says what it has found."""
        how = self._config.preflight
        verdict = self._reach()
        stops = bool(verdict.findings) and how.on_failure is not OnFailure.warn
        if not last and (self.alone or not stops):
            return None  # where machines are checked alone, all is measured before anything is said
        print(verdict.show(len(set(self._nodes)), time.monotonic() - self._started, self.alone), flush=True)
        if stops and how.on_failure is OnFailure.exclude and verdict.unfit:
            exclude(self._folder, verdict.unfit)
        return verdict.refuse(how.on_failure) if stops or (self.alone and verdict.findings) else None

    def _find_disk(self) -> Path | None:
        from training.checkpoint.folders import find_root

        root = find_root(self._config.checkpoint.folder, self._folder)
        if not isinstance(root, Path):
            return None  # a store of objects, which is tried in a way of its own
        # The folder is made by the first checkpoint.
        return next(path for path in (root, *root.parents) if path.is_dir())

    def _choose_device(self) -> Any:
        import torch

        index = None if self._kind == "cpu" else int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device(self._kind, index) if index is not None else torch.device(self._kind)
