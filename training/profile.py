"""A profile of some steps of a run: what every rank computes, sends and allocates, as traces that Perfetto opens.

    runs/<id>/profile/rank-<r>.json.gz    every operation of a rank, as torch.profiler has seen it
                      trace.json          the ranks of the first machine side by side: training/timeline.py
                      memory.json         the most that each of them had allocated in every step, and what for
                      rank-<r>.pickle     on CUDA: torch's snapshot of the allocator, for pytorch.org/memory_viz

Nothing is recorded, and nothing costs anything, outside of ``profile.steps``. A profile changes no number.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from parallel.topology import Axis
from training.agree import wait_for_all
from training.joined import join, tell_memory
from training.picture import simulate_step
from training.setup import Setup

ACTIVITIES = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}  # besides the CPU's
HISTORY = 1_000_000  # calls of the allocator that a snapshot has


class Profile:
    """The profile of a run: of the steps that ``profile.steps`` names, or of none."""

    def __init__(self, setup: Setup, folder: Path, note: Callable[[str], None]) -> None:
        """``folder`` is the run's; ``note`` gets lines for a person."""
        self._setup, self._folder, self._note = setup, folder / "profile", note
        self._config, self._steps = setup.config.profile, setup.config.profile.range()
        self._profiler: profile | None = None

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """What happens inside is step ``step``, from 0. Collective over all ranks where a profile begins or ends."""
        if step not in self._steps:
            yield
            return
        if self._profiler is None:
            self._profiler = self._begin()
        with record_function(f"step {step + 1}"):
            yield
        if step + 1 == self._steps.stop:
            self.close()

    def close(self) -> None:
        """Ends the profile, if it has begun, and writes it. Collective over all ranks."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        mesh, path = self._setup.mesh, self._folder / f"rank-{self._setup.mesh.rank}.json.gz"
        self._setup.engine.settle()  # what the profiler has seen begin must end before it does
        profiler.stop()
        self._folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(path))
        if self._remembers:
            torch.cuda.memory._dump_snapshot(str(path.with_name(f"rank-{mesh.rank}.pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)
        wait_for_all(mesh)
        if mesh.rank == 0:
            self._join()

    @property
    def _remembers(self) -> bool:
        return self._config.memory and self._setup.mesh.device.type == "cuda"

    def _begin(self) -> profile:
        device = self._setup.mesh.device.type
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch tells every terminal that it begins
        if self._remembers:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY)
        # The profiler follows allocations or threads that it has not seen begin, such as that of the engine's sums.
        threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=not self._config.memory)
        profiler = profile(
            activities=[ProfilerActivity.CPU, *([ACTIVITIES[device]] if device in ACTIVITIES else [])],
            profile_memory=self._config.memory,
            experimental_config=threads,
        )
        self._setup.engine.settle()
        profiler.start()
        wait_for_all(self._setup.mesh)  # beginning takes a while, on every rank another
        return profiler

    def _join(self) -> None:
        ranks = range(min(self._setup.mesh.ranks_per_node, self._setup.mesh.topology.world))
        places = {rank: self._setup.mesh.topology.coordinate(rank, Axis.pp) for rank in ranks}
        joined = join(self._folder, places, simulate_step(self._setup.config, self._setup.mesh))
        self._note(f"profile of steps {self._config.steps} in {joined}: open it in ui.perfetto.dev")
        if self._config.memory:
            self._note(tell_memory(self._folder))
