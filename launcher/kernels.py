"""``shoestring kernels``: compiles every kernel for GPUs that need not be there, and prints what each needs of one.

    shoestring kernels                    for H100, B200 and MI300X
    shoestring kernels target=cuda:90     for one of them

Two tables: what a kernel takes of a multiprocessor (registers, spills, shared memory, and the share of its warps that
this leaves room for), and what bounds it, on shapes of DeepSeek-V3. Nothing runs, and nothing is timed.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher import cli
from launcher.invocation import Invocation
from launcher.keys import nearest

if TYPE_CHECKING:
    from model.kernels.chips import Chip
    from model.kernels.compile import Case, Compiled

SUMMARY = "compile every kernel for GPUs ahead of time, and print what each needs and what bounds it"


@dataclass(kw_only=True, slots=True)
class Config:
    """For which GPUs."""

    target: str | None = None  # cuda:90 (H100), cuda:100 (B200) or hip:gfx942 (MI300X); null: all of them


def run(config: Config, invocation: Invocation) -> int:
    """Prints both tables; 1 if a kernel that ships must not."""
    try:
        import triton
    except ImportError as error:
        raise ValueError("kernels: Triton is not installed; it has wheels for Linux alone") from error
    from model.kernels import cases as model_cases
    from model.kernels.chips import CHIPS
    from model.kernels.compile import compile_cases
    from parallel.kernels import cases as parallel_cases

    if config.target is not None and config.target not in CHIPS:
        raise ValueError(f"target={config.target} is none of {', '.join(CHIPS)}{nearest(config.target, CHIPS)}")
    print(f"Triton {triton.__version__}")
    faults = []
    for target in CHIPS if config.target is None else (config.target,):
        cases = [*model_cases.list_cases(model_cases.Inputs(target)), *parallel_cases.list_cases(target)]
        print(f"\n{CHIPS[target].name}, {target}\n\n{HEAD}", flush=True)
        made = []
        for compiled in compile_cases(target, cases):
            print(write(compiled), flush=True)
            made.append(compiled._replace(text="", binary=b""))
            if compiled.case.shipped:
                faults += [f"{name(compiled.case)} on {target} {fault}" for fault in compiled.faults()]
        print("\n" + "\n".join(write_bounds(CHIPS[target], made)), flush=True)
    for fault in faults:
        print(f"shoestring: {fault}", file=sys.stderr)
    return 1 if faults else 0


HEAD = f"{'kernel':<52}{'registers':>10}{'spills':>8}{'shared':>8}{'occupancy':>11}  matrix units"


def name(case: "Case") -> str:
    """With its configuration; in brackets where it is only tried."""
    text = f"{case.name}: {case.configuration}" if case.configuration else case.name
    return text if case.shipped else f"({text})"


def write(compiled: "Compiled") -> str:
    """A line of the first table. Spills are bytes a thread on NVIDIA, registers on AMD."""
    c = compiled
    numbers = f"{c.registers:>10}{c.spills:>8}{c.shared:>8}{c.occupancy:>10.0%} "
    return f"{name(c.case):<52}{numbers} {c.instruction}".rstrip()


def write_bounds(chip: "Chip", made: "list[Compiled]") -> list[str]:
    """The second table: operations, bytes, their ratio, and the time that a call takes at least."""
    lines = [f"{'kernel':<20}{'Gflop':>10}{'MB':>10}{'flop/byte':>11}{'at least':>13}  bound by"]
    for case, work, *_ in made:
        if case.shipped and work.bytes:
            seconds, bound = work.bound(chip)
            ratio = work.operations / work.bytes
            numbers = f"{work.operations / 1e9:>10.1f}{work.bytes / 1e6:>10.1f}{ratio:>11.1f}{seconds * 1e6:>10.1f} us"
            lines.append(f"{case.name:<20}{numbers}  {bound}")
    return lines


if __name__ == "__main__":
    sys.exit(cli.main(["kernels", *sys.argv[1:]]))
