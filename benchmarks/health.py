"""What watching over a run costs: steps with a heartbeat to steps without, and summing up state to a step.

    python benchmarks/health.py [--preset small] [--rounds 9]

One process, steps of both kinds in turns, medians.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launcher.compose import Composer  # noqa: E402
from training.health.config import HealthConfig  # noqa: E402
from training.health.fingerprint import Fingerprints  # noqa: E402
from training.health.pulse import Pulse  # noqa: E402
from training.machine import join_mesh  # noqa: E402
from training.setup import set_up  # noqa: E402
from training.step import run_step  # noqa: E402


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    words = (f"run={options.preset}", "run.compile=off")
    config = Composer().compose(words)[0]
    with tempfile.TemporaryDirectory() as name, join_mesh(config) as mesh:
        setup = set_up(config, print, mesh)
        fingerprints = Fingerprints(setup, 1)
        step, alone, beside, summed = 0, list[float](), list[float](), list[float]()
        for _ in range(options.rounds + 1):
            began = perf_counter()
            run_step(setup, step, lambda: False)
            alone.append(perf_counter() - began)
            with Pulse(HealthConfig(heartbeat=2.0), Path(name), 0, 1):
                began = perf_counter()
                run_step(setup, step + 1, lambda: False)
                beside.append(perf_counter() - began)
            began = perf_counter()
            fingerprints.take(step + 2)
            fingerprints.verify()
            summed.append(perf_counter() - began)
            step += 2
    plain, watched, sums = (median(times[1:]) for times in (alone, beside, summed))
    print(f"a step of {options.preset}: {1000 * plain:.1f} ms; beside a heartbeat {watched / plain:.3f} of that")
    print(f"state summed up and compared: {1000 * sums:.2f} ms, {sums / plain:.3f} of a step")


if __name__ == "__main__":
    main()
