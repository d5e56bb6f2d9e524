"""Every call of a collective in the code that trains, found by reading it; and, in words, what no reading finds.

All of parallel/ and training/ is scanned. A call counts if it is one of torch.distributed's, or of a function of ours
that does nothing but send. What makes ranks talk without such a call is listed in ``UNSEEN``.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SCANNED = ("parallel", "training")
LEFT_OUT = "training/proof"  # the judge: it runs in no training, and its own messages carry only what it compares
MESSENGERS = ("parallel/collectives.py", "parallel/reduce.py", "training/agree.py")  # all public functions send
# What torch.distributed does without sending anything that training reads.
SILENT = {
    *("get_backend", "get_rank", "get_world_size", "get_process_group_ranks", "P2POp"),
    *("FileStore", "HashStore", "init_process_group", "new_group", "destroy_process_group", "PrefixStore"),
}
# Functions of ours that do nothing but send, besides those of MESSENGERS.
OWN = {
    "_exchange",
    "_post",
    "_swap",
    "self._start",
}  # functions of ours that do nothing but send, besides those of MESSENGERS
TALKING = ("torch.distributed", "torch.nn.parallel", "deepspeed")  # libraries whose objects send on their own
GROUPS = ("group", "self._group")  # and what groups are called: all of their methods send but these
OPERATORS = ("torch.ops.symm_mem",)  # torch's, that send
ASKING = {"size", "rank", "group_name", "index"}


class Unseen(NamedTuple):
    """What a file takes from a library that sends on its own, and the test that holds its numbers."""

    file: str
    names: set[str]
    what: str
    test: str


UNSEEN = [
    Unseen("parallel/collectives.py", {"group.send", "group.recv"}, "parts go one by one", "test_the_proof_notices"),
    Unseen("parallel/pipeline/run.py", {"group.send", "group.recv"}, "stages send", "test_the_proof_notices"),
    Unseen(
        "parallel/collective_matmul.py", {"group.send", "group.recv"}, "tp ranks send blocks", "test_the_proof_notices"
    ),
    Unseen(
        "parallel/collective_matmul.py",
        {"torch.ops.symm_mem.fused_all_gather_matmul", "torch.ops.symm_mem.fused_matmul_reduce_scatter"},
        "they gather and sum",
        "test_fused_operators_are_asked_for_the_right_thing",
    ),
    Unseen("parallel/mesh.py", {"rendezvous"}, "nothing: finds a store", "test_the_proof_notices"),
    Unseen(
        "training/checkpoint/plan.py",
        {
            *("LoadPlan", "LoadPlanner", "ReadItem", "StorageReader", "ChunkStorageMetadata", "Metadata"),
            *("MetadataIndex", "TensorProperties", "TensorStorageMetadata", "create_read_items_for_chunk_list"),
        },
        "nothing: each rank plans and reads alone",
        "test_promises_are_kept_and_seen_broken",
    ),
    Unseen(
        "training/fsdp2.py",
        {"fully_shard", "FSDPModule", "MixedPrecisionPolicy", "DeviceMesh", "DTensor", "Shard"},
        "fully_shard gathers weights and scatters gradients",
        "test_libraries_are_proved_as_well",
    ),
    Unseen(
        "training/gather.py",
        {"DTensor", "GatheredParameters"},
        "they gather what engines have cut",
        "test_libraries_are_proved_as_well",
    ),
    Unseen(
        "training/partition.py",
        {"deepspeed", "DeepSpeedZeroOptimizer", "logger", "NoopTimer"},
        "its optimizer sums, cuts and gathers",
        "test_libraries_are_proved_as_well",
    ),
    Unseen(
        "training/zero3.py",
        {"deepspeed", "DeepSpeedZeroOptimizer_Stage3", "defragment", "NoopTimer"},
        "its optimizer gathers weights, and averages and cuts gradients",
        "test_libraries_are_proved_as_well",
    ),
    Unseen(
        "parallel/tensor.py",
        {"GroupName", "_resolve_process_group"},
        "nothing: finds a group",
        "test_the_proof_notices",
    ),
]


class Site(NamedTuple):
    """A call of a collective."""

    file: str
    function: str  # qualified
    callee: str  # as written there
    index: int = 0  # among the same calls of the function


def find_sites() -> set[Site]:
    """Every call of a collective where training could make one."""
    senders = OWN | {
        node.name
        for file in MESSENGERS
        for node in _parse(file).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }

    def sends(callee: str) -> bool:
        owner, _, name = callee.rpartition(".")
        return name not in SILENT if owner in ("dist", "torch.distributed") else callee in senders

    return {site for file in list_files() for site in find_calls(file) if sends(site.callee)}


def find_unseen() -> set[tuple[str, str]]:
    """File and name of what is imported from torch.distributed's modules and from DeepSpeed, and asked of groups."""
    found = set[tuple[str, str]]()
    for file in list_files():
        for node in ast.walk(_parse(file)):
            if isinstance(node, ast.Import):
                found |= {(file, "deepspeed") for alias in node.names if alias.name.startswith("deepspeed")}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(TALKING):
                found |= {(file, alias.name) for alias in node.names}
            elif isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value)
                if owner in OPERATORS or (owner in GROUPS and node.attr not in ASKING):
                    found.add((file, ast.unparse(node)))
    return found


def list_files() -> list[str]:
    """What is scanned."""
    paths = sorted(str(path.relative_to(ROOT)) for room in SCANNED for path in (ROOT / room).rglob("*.py"))
    return [path for path in paths if not path.startswith(LEFT_OUT)]


@cache
def _parse(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


@cache
def find_calls(file: str) -> dict[Site, range]:
    """Every call in a file, and its lines."""
    calls: dict[Site, range] = {}
    for function, call in _calls(_parse(file), ""):
        site = Site(file, function, ast.unparse(call.func))
        while site in calls:
            site = site._replace(index=site.index + 1)
        calls[site] = range(call.lineno, (call.end_lineno or call.lineno) + 1)
    return calls


def _calls(node: ast.AST, inside: str) -> Iterator[tuple[str, ast.Call]]:
    """Calls in source order with the qualified name of the function around them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield inside, child
        named = isinstance(child, ast.FunctionDef | ast.ClassDef)
        yield from _calls(child, f"{inside}.{child.name}".lstrip(".") if named else inside)  # type: ignore[attr-defined]
