"""An attempt of a job at a run: its ranks as one step after another, and what becomes of it (launcher/supervise.py)."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from configs.schema import RunConfig
from launcher import folder, report, restarts
from launcher.preflight.unfit import read_excluded
from launcher.slurm import nodes, srun, step
from training.checkpoint import fence, place
from training.health.beat import read_beat

MISSING = 3  # of ``Supervisor.begin``: too few nodes
STATE = "state.json"  # in the run's folder
SILENCE = 15  # heartbeats that a node's ranks may all miss


class Supervisor:
    """One attempt of a job at a run."""

    def __init__(self, run: Path, config: RunConfig, job: nodes.Job) -> None:
        self.run, self.config, self.job = run, config, job
        self._started, self._short = 0, False
        self._lost = set(read_excluded(run))  # nodes that this job does not count on
        self._asked: signal.Signals | None = None  # the signal that ends the job
        self._step: step.Step | None = None
        self._heard: dict[int, tuple[int, float]] = {}  # each rank's last heartbeat, and when it was seen first
        self._words = ""

    def hear(self, number: int, frame: object) -> None:
        """A signal: passed on to the ranks, who save and end."""
        self._asked = signal.Signals(number)
        if self._step is not None:
            self._step.send(signal.SIGUSR2)

    def say(self, state: str, words: str) -> None:
        """Keeps how the run stands, for who asks; and says so in the job's output."""
        facts = {"state": state, "words": words, "time": time.time_ns(), "job": self.job.id}
        facts |= {"attempt": self.job.attempt, "restarts": max(0, self._started - 1), "node": self.job.here}
        if self._owns():  # else another attempt says how it stands
            place.replace_text(self.run / STATE, json.dumps(facts | {"process": os.getpid()}) + "\n")
        print(f"shoestring: job {self.job.id}, {state}: {words}", flush=True)

    def begin(self, attempt: str) -> int:
        """Ranks from their start to their end; the exit code, ``restarts.DIED`` where they may be started again."""
        cluster = self.config.cluster
        self._lost |= nodes.find_broken(self.job.nodes)
        healthy = [node for node in self.job.nodes if node not in self._lost]
        if len(healthy) < cluster.nodes:
            self._short = True
            self._words = f"{len(healthy)} of its {len(self.job.nodes)} nodes are left, the run needs {cluster.nodes}"
            return MISSING
        layout = srun.Layout(tuple(healthy[: cluster.nodes]), cluster.devices_per_node)
        self._started, self._heard = self._started + 1, {}
        command = srun.write_command(layout, cluster, self.run)
        self.say("running" if self._started == 1 else "restarting", f"ranks start on {', '.join(layout.nodes)}")
        if self._asked is not None:
            return 128 + self._asked
        others = [node for node in layout.nodes if node != self.job.here]
        self._step = step.Step(command, others, attempt)
        if self._asked is not None:  # in the meantime
            self._step.send(signal.SIGUSR2)
        outcome = self._step.wait(lambda: bool(self._find_silent(layout)), lambda: nodes.end_steps(self.job.id))
        self._step = None
        return self._judge(outcome, layout)

    def _judge(self, outcome: srun.Outcome, layout: srun.Layout) -> int:
        """What came of a step."""
        if outcome.code == 0:
            if self._asked is None and folder.RunFolder(self.run).ending == "interrupted":
                self._words = "ranks were told to stop, by nobody that this job knows"
                print(f"shoestring: {self._words}", file=sys.stderr, flush=True)
                return restarts.DIED
            return 0
        if self._asked is not None:
            return 128 + self._asked
        world, known = len(layout.nodes) * layout.ranks, set(self._lost)
        self._lost |= set(outcome.lost) | nodes.find_broken(self.job.nodes)
        self._lost |= {node for node in self._find_silent(layout) if not nodes.answers(node)}
        lost = [node for node in layout.nodes if node in self._lost - known]
        codes: dict[int, int | None] = {rank: outcome.codes.get(rank) for rank in range(world)}
        deaths = report.read_deaths(self.run, codes)
        if lost:
            first = layout.nodes.index(lost[0]) * layout.ranks
            deaths = report.lose(deaths, range(first, first + layout.ranks), lost[0])
        if (mistake := report.mistake(deaths)) is not None:
            if not (unfit := set(read_excluded(self.run)) - known):
                raise ValueError(mistake)
            self._lost |= unfit  # preflight.on_failure=exclude: on others, here or in another job
            print(f"shoestring: {mistake}", file=sys.stderr, flush=True)
            return restarts.LOST
        if self._owns():
            report.keep_verdict(self.run, deaths)
        print(report.describe(self.run, deaths), file=sys.stderr, flush=True)
        verdict = report.read_verdict(self.run)
        self._words = verdict.words if verdict is not None else f"srun ended with exit code {outcome.code}"
        return restarts.LOST if lost else restarts.DIED

    def conclude(self, code: int) -> int:
        """The job ends: with a word about it, and perhaps for another attempt. The exit code."""
        ending = folder.RunFolder(self.run).ending if code == 0 else None
        if ending in ("finished", "diverged"):
            self.say("finished" if ending == "finished" else "failed", f"the run has {ending}")
            return int(ending != "finished")
        if self._asked is signal.SIGTERM:
            self.say("interrupted", "Slurm ends the job: cancelled, short of a node, or in another's way")
            return 130
        if self._asked is not None:
            return self._requeue("asked to stop, and saved" if ending else "asked to stop; not all could be saved")
        if self._short:
            return self._requeue(self._words)
        self.say("interrupted" if ending else "failed", self._words or "the run was interrupted")
        return 130 if ending else 1

    def _owns(self) -> bool:
        """Whether no other attempt has begun since."""
        return fence.read(self.run).startswith(f"{self.job.name}.")

    def _requeue(self, why: str) -> int:
        if not self.config.cluster.requeue:
            self.say("interrupted", f"{why}; cluster.requeue=false: submit it again to go on")
            return 1
        self.say("requeued", f"{why}: the job is back in the queue")
        nodes.requeue(self.job.id, sorted(read_excluded(self.run)))
        return 0

    def _find_silent(self, layout: srun.Layout) -> list[str]:
        """Nodes of which no rank gives a sign of life any more, while those of others do, or have said why not."""
        every = self.config.health.heartbeat
        if every is None:
            return []
        silent, heard = set[str](), set[str]()
        for rank in range(len(layout.nodes) * layout.ranks):
            beat = read_beat(self.run, rank)
            if beat is None:
                continue
            if self._heard.get(rank, (0, 0.0))[0] != beat.time:
                self._heard[rank] = beat.time, time.monotonic()  # clocks of machines may differ
            alive = time.monotonic() - self._heard[rank][1] < SILENCE * every
            said = report.read_ending(self.run, rank) is not None
            (heard if alive or said else silent).add(layout.nodes[rank // layout.ranks])
        return sorted(silent - heard) if heard else []
