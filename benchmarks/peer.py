"""The peer of benchmarks/step.py: `transformers`' DeepseekV3ForCausalLM, trained as well as it can be.

    forward with labels -> backward -> clip the norm to 1 -> fused AdamW over float32 masters -> copy back

It has the weights of one of our models, and those of its implementations of attention and experts that are fastest:

    python -m benchmarks.peer --shape 8x256 --precision bf16 [--compiled]     times all, each in a process of its own
"""

import argparse
import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from launcher.compose import Composer
from model.batch import Batch, slice_labels
from model.build import build
from model.huggingface import Resident, publish
from model.huggingface_config import describe
from model.transformer import Transformer

ROOT = Path(__file__).resolve().parent.parent
ATTENTION = ("sdpa", "eager")
EXPERTS = ("grouped_mm", "batched_mm", "eager")
IGNORED = -100  # the label that counts for nothing
RATE = 1e-3
WARM, ROUNDS = 3, 5
TIMEOUT = 600  # seconds for one choice, compilation included
MEMORY = 4e9  # bytes


class Choice(NamedTuple):
    """Which of its implementations to use."""

    attention: str
    experts: str


class Peer:
    """`transformers`' model with the weights of ``model`` and an optimizer, ready to step."""

    def __init__(self, model: Transformer, dtype: torch.dtype, compiled: bool, attention: str, experts: str) -> None:
        assert model.config.mtp.depth == 0, "transformers does not train MTP"
        transformers.utils.logging.disable_progress_bar()
        values = describe(model.config, str(dtype).removeprefix("torch."))
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values, use_cache=False)
        self.model: Any = transformers.DeepseekV3ForCausalLM.from_pretrained(
            None,
            config=config,
            state_dict={name: tensor.make() for name, tensor in publish(Resident(model), model.config).items()},
            dtype=dtype,
            attn_implementation=attention,
            experts_implementation=experts,
        ).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.shares = dtype == torch.float32  # parameters are their own masters
        self.masters = self.parameters if self.shares else [p.detach().float() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self._groups(), lr=RATE, betas=(0.9, 0.95), fused=True)
        if not self.shares:
            for master in self.masters:
                master.grad = torch.zeros_like(master)
        if compiled:
            self.model.compile()

    def step(self, batch: Batch) -> float:
        """One training step; the mean cross entropy in nats over the counted labels, before it."""
        labels, counted = slice_labels(batch, 0, 0)
        labels = labels.masked_fill(~counted, IGNORED)
        tokens = batch.ids[:, :-1]
        loss: Tensor = self.model(input_ids=tokens, labels=tokens, shift_labels=labels).loss
        loss.backward()
        if not self.shares:
            torch._foreach_copy_([m.grad for m in self.masters], [p.grad for p in self.parameters])
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        self.optimizer.step()
        if not self.shares:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)
        for parameter in self.parameters:
            parameter.grad = None
        return loss.item()

    def _groups(self) -> list[dict[str, Any]]:
        """Weight decay for matrices, none for norms."""
        decayed = [master for master in self.masters if master.dim() > 1]
        others = [master for master in self.masters if master.dim() == 1]
        return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def choose(shape: str, precision: str, compiled: bool, threads: int = 2) -> Choice:
    """The fastest implementations at a shape ("8x256"), each timed in a process of its own and reported as a line."""
    times: dict[Choice, float] = {}
    for choice in map(Choice._make, product(ATTENTION, EXPERTS)):
        words = ["--shape", shape, "--precision", precision, "--threads", str(threads), "--time", *choice]
        command = [sys.executable, "-m", "benchmarks.peer", *words, *(["--compiled"] if compiled else [])]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
            last = (done.stdout or done.stderr).strip().splitlines()[-1]
        except subprocess.TimeoutExpired:
            last = f"not done in {TIMEOUT} s"
        print(
            f"  transformers {shape} {precision} {'compiled' if compiled else 'eager'} {choice}: {last}",
            file=sys.stderr,
        )
        if last.startswith("{"):
            times[choice] = json.loads(last)["seconds"]
    return min(times, key=times.__getitem__)


def time_steps(choice: Choice, shape: str, precision: str, compiled: bool) -> float:
    """Median seconds of a step of preset small after it has warmed up."""
    config = Composer().compose(("run=small",))[0].model
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    sequences, length = map(int, shape.split("x"))
    moe = config.moe
    copies = sequences * length * moe.top_k * 3 * moe.ffn * config.hidden * dtype.itemsize
    if choice.experts == "batched_mm" and copies * (config.num_layers - config.dense_layers) > MEMORY:
        raise SystemExit("left out: it copies the weights once for every choice of every token, more than 4 GB")
    ids = torch.randint(0, 256, (sequences, length + 1))
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), None)
    peer = Peer(build(config, dtype, "cpu", seed=0), dtype, compiled, *choice)
    seconds = []
    for _ in range(WARM + ROUNDS):
        start = time.perf_counter()
        peer.step(batch)
        seconds.append(time.perf_counter() - start)
    return median(seconds[WARM:])


def main() -> None:
    """Prints what ``choose`` finds; with ``--time``, the seconds of one choice as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8x256")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--time", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.time:
        seconds = time_steps(Choice(*options.time), options.shape, options.precision, options.compiled)
        print(json.dumps({"seconds": seconds}))
    else:
        print(*choose(options.shape, options.precision, options.compiled, options.threads))


if __name__ == "__main__":
    main()
