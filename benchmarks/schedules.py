"""How long it takes to make, check and simulate schedules of a thousand ranks, and how much memory.

Each schedule is measured in a process of its own, so that its peak of memory is its own too.

python benchmarks/schedules.py --ranks 1024 --microbatches 256        every schedule whose rule allows these numbers
python benchmarks/schedules.py --only 1f1b --microbatches 4096
"""

import argparse
import multiprocessing
import resource
from time import perf_counter, process_time

from parallel.pipeline.schedules import SCHEDULES, generate
from parallel.pipeline.simulate import simulate
from parallel.pipeline.validate import validate


def measure(name: str, ranks: int, microbatches: int, virtual: int) -> None:
    """Prints a row for one schedule."""
    started, used, seconds = perf_counter(), process_time(), []
    schedule = generate(name, ranks, microbatches, virtual)
    seconds.append(perf_counter() - started)
    for step in (validate, simulate):
        before = perf_counter()
        step(schedule)
        seconds.append(perf_counter() - before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    actions = sum(map(len, schedule.lists))
    row = "".join(f"{number:>10.2f}" for number in (*seconds, sum(seconds), process_time() - used))
    print(f"{name:<25}{microbatches:>7}{virtual:>8}{actions:>12,}{row}{peak:>8.2f}", flush=True)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--microbatches", type=int, default=256, help="raised to the least that a schedule takes")
    parser.add_argument("--virtual", type=int, default=2, help="stages a rank, where a schedule leaves them open")
    parser.add_argument("--only", choices=SCHEDULES, help="one schedule")
    options = parser.parse_args()
    print(f"{options.ranks} ranks; seconds, the last but one column of processor time; GB at the peak")
    print(f"{'schedule':<25}{'micro':>7}{'virtual':>8}{'slots':>12}{'generate':>10}{'validate':>10}{'simulate':>10}"
          f"{'together':>10}{'cpu':>10}{'GB':>8}")  # fmt: skip
    for name in [options.only] if options.only else SCHEDULES:
        microbatches = max(options.microbatches, SCHEDULES[name].least * options.ranks)
        virtual = options.virtual if SCHEDULES[name].virtual else 1
        process = multiprocessing.get_context("spawn").Process(
            target=measure, args=(name, options.ranks, microbatches, virtual)
        )
        process.start()
        process.join()


if __name__ == "__main__":
    main()
