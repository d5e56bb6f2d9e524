"""How fast the kernels are on this GPU, beside torch's own operation and the chip's roofline. A few minutes.

    python benchmarks/gpu.py                 every kernel that ships
    python benchmarks/gpu.py --tried         also the configurations that do not
    python benchmarks/gpu.py rows weights    these

For each, medians of calls on shapes of DeepSeek-V3 (model/kernels/cases.py), ours and the peer in turns: the time, the
rate, its share of what the roofline allows, and ours over the peer's. Operands lie beyond the caches, which are flushed
before each call. The configurations of a product come in the order of model/kernels/operators.py, where the first is
the one that runs: put the fastest first.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.exchange import SUMS, Copies, lay_out
from model.fp8_ops import REFERENCE
from model.kernels import cases
from model.kernels.chips import CHIPS, Chip
from model.kernels.compile import Case
from model.kernels.operators import NATIVE, find_chip
from model.router import CHOICES

ROUNDS = 20
Timer = Callable[[Callable[[], object]], float]


class Real(cases.Inputs):
    """Tensors with values: normal ones, runs of random lengths, choices of random experts."""

    def __init__(self, target: str, device: str) -> None:
        super().__init__(target)
        self.device, self.generator = device, torch.Generator(device).manual_seed(0)

    def wide(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return (drawn.abs() if len(shape) == 1 else drawn).to(dtype)

    def ends(self) -> Tensor:
        cuts = torch.randint(cases.CHOSEN + 1, (cases.EXPERTS - 1,), generator=self.generator, device=self.device)
        return F.pad(cuts.sort().values, (0, 1), value=cases.CHOSEN).int()

    def copies(self) -> Copies:
        spare = torch.randint(cases.CAME, (cases.CHOSEN - cases.CAME,), generator=self.generator, device=self.device)
        tokens = torch.cat((torch.arange(cases.CAME, device=self.device), spare)).sort().values
        experts = torch.randint(cases.EXPERTS, (cases.CHOSEN,), generator=self.generator, device=self.device)
        return lay_out(experts, tokens, cases.CAME, cases.EXPERTS, 1).copies


class Peer(NamedTuple):
    """What the same costs without the kernel."""

    name: str
    call: Callable[[], object]


def list_peers(inputs: Real) -> dict[str, Peer]:
    """By the name of a case; torch's own operation, or ours in plain torch, compiled where that makes it one pass."""
    x, scores = inputs.wide(cases.TOKENS, cases.WIDTH), inputs.wide(cases.TOKENS, 256, dtype=torch.float32)
    weight, rows = inputs.wide(cases.FFN, cases.WIDTH), inputs.wide(cases.CHOSEN, cases.WIDTH)
    experts, g = inputs.wide(cases.EXPERTS, cases.FFN, cases.WIDTH), inputs.wide(cases.CHOSEN, cases.FFN)
    both, share = inputs.wide(cases.CHOSEN, 2 * cases.FFN), inputs.wide(cases.CHOSEN, dtype=torch.float32)
    copies, ends, quantise = inputs.copies(), inputs.ends(), torch.compile(REFERENCE.quantise)
    narrow, block = (inputs.quantised(*t.shape, scaling=s) for t, s in ((x, cases.LINE), (weight, cases.BLOCK)))
    came, kept = inputs.wide(cases.CAME, cases.WIDTH), inputs.quantised(cases.CAME, cases.WIDTH)
    peers = {
        "quantise, lines": Peer("torch.compile", lambda: quantise(x, cases.LINE)),
        "quantise, columns": Peer("torch.compile", lambda: quantise(x.t(), cases.LINE)),
        "quantise, blocks": Peer("torch.compile", lambda: quantise(weight.float(), cases.BLOCK)),
        "product": Peer("BF16 matmul", lambda: x @ weight.t()),
        "rows": Peer("BF16 grouped_mm", lambda: torch._grouped_mm(rows, experts.mT, offs=ends)),
        "weights": Peer("BF16 grouped_mm", lambda: torch._grouped_mm(g.t(), rows, offs=ends)),
        "activate": Peer("plain torch", lambda: REFERENCE.activate(both, share, cases.LINE)),
        "copy": Peer("plain torch", lambda: REFERENCE.enter(kept, cases.LINE, copies)),
        "sum copies": Peer("embedding_bag", lambda: SUMS["cpu"].forward(rows, *copies[1:], share)),
        "weigh back": Peer("plain torch", lambda: SUMS["cpu"].backward(came, rows, share, copies)),
        "choose": Peer("topk, twice", lambda: CHOICES["cpu"](scores, 8, 2, 4, 8)),
    }
    if native := NATIVE.get((inputs.target, narrow.tile, block.tile)):
        peers["product"] = Peer("scaled_mm", lambda: native.multiply(narrow, block, torch.bfloat16))
    return peers


def time_on_gpu(flush: Tensor, call: Callable[[], object]) -> float:
    """Seconds of one call, behind a cache that holds nothing of its operands."""
    flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(timer: Timer, *calls: Callable[[], object]) -> list[float]:
    """The median of each, in turns."""
    for call in calls:
        for _ in range(3):
            call()
    rounds = [[timer(call) for call in calls] for _ in range(ROUNDS)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def write(case: Case, chip: Chip, times: list[float], peer: Peer | None) -> str:
    """A line of the table."""
    work = case.work(case.call())
    bound, by = work.bound(chip)
    seconds = times[0]
    rate = (
        f"{work.bytes / seconds / 1e9:7.0f} GB/s"
        if by == "memory"
        else f"{work.operations / seconds / 1e12:6.0f} Tflop/s"
    )
    beside = f"{times[1] * 1e6:10.1f} us {times[0] / times[1]:6.2f}  {peer.name}" if peer else ""
    name = f"{case.name} {case.configuration}".strip()
    return f"{name:<46}{seconds * 1e6:>10.1f} us{rate:>16}{bound / seconds:>9.0%}{beside}"


def run(inputs: Real, timer: Timer, names: list[str], tried: bool) -> None:
    """The table."""
    chip, peers = CHIPS[inputs.target], list_peers(inputs)
    print(f"{'kernel':<46}{'time':>13}{'rate':>16}{'of bound':>9}{'peer':>13}{'ours/it':>7}")
    for case in cases.list_cases(inputs):
        if (names and case.name not in names) or not (case.shipped or tried):
            continue
        peer = peers.get(case.name)
        times = measure(timer, case.call, *([peer.call] if peer else []))
        print(write(case, chip, times, peer), flush=True)


def main() -> int:
    """On the first GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="kernels; all of them if none is named")
    parser.add_argument("--tried", action="store_true", help="also configurations that do not ship")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: there is no GPU here", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    target = find_chip(device)
    if target not in CHIPS:
        print(
            f"benchmarks/gpu.py: the roofline of {target} is not known; there are {', '.join(CHIPS)}", file=sys.stderr
        )
        return 2
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {target}")
    flush = torch.empty(2**28, dtype=torch.int8, device=device)
    run(Real(target, "cuda"), partial(time_on_gpu, flush), options.names, options.tried)
    return 0


if __name__ == "__main__":
    sys.exit(main())
