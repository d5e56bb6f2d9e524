"""The schedule of a run as it is simulated before the first step: its picture, its text, its bubble.

    runs/<id>/schedule.svg    when each pipeline rank computes what
              schedule.txt    the same as lists, which parallel.pipeline.file and ``shoestring schedule file=`` read

A forward of an average stage costs 1, a backward 2, each of its halves 1, and messages nothing; a stage takes longer or
shorter by the weights that a token is multiplied with there. What is seen is the bubble of the schedule and of stages
that differ.
"""

from pathlib import Path

from configs.schema import TrainConfig
from parallel.mesh import Axis, Mesh
from parallel.pipeline.draw import write_svg
from parallel.pipeline.plan import divide_model
from parallel.pipeline.simulate import Cost, Timeline, simulate, stretch
from parallel.pipeline.stages import weigh
from parallel.pipeline.text import render
from training.arrange import take_schedule


def simulate_step(config: TrainConfig, mesh: Mesh) -> Timeline:
    """A step of the full batch."""
    schedule = take_schedule(config, mesh.degree(Axis.dp))
    shares = weigh(config.model, divide_model(config.parallel, config.model, schedule).layers)
    return simulate(schedule, Cost(), stretch(schedule, Cost(), [share * schedule.stages for share in shares]))


def describe_schedule(timeline: Timeline, config: TrainConfig) -> dict[str, object]:
    """For the record: the schedule, and the largest share of a step in which a rank has no work."""
    return {
        "schedule": config.parallel.name_schedule(),
        "stages": timeline.schedule.stages,
        "micro_batches": timeline.schedule.microbatches,
        "bubble": float(max(timeline.bubbles)) / float(timeline.makespan),
    }


def draw_schedule(timeline: Timeline, folder: Path) -> None:
    """Writes the picture and the text of a pipeline of several ranks."""
    if timeline.schedule.ranks > 1:
        (folder / "schedule.svg").write_text(write_svg(timeline), encoding="utf-8")
        (folder / "schedule.txt").write_text(render(timeline.schedule), encoding="utf-8")
