"""Why a job is not running, in words, and what to do: Slurm's own reasons, as squeue and scontrol write them.

Exact names first, then patterns: limits have names such as QOSMaxGRESPerUser, of which there are hundreds.
"""

import re
from typing import NamedTuple


class Reason(NamedTuple):
    """What a reason means, and what can be done about it; nothing where there is nothing to do."""

    words: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.words}; {self.advice}" if self.advice else self.words


HELD = "release it: scontrol release {job}"
SMALLER = "ask for less, or leave a limit to others: cluster.nodes, cluster.timeout_min, cluster.qos"
RESUME = "go on: shoestring submit with run.id={run} checkpoint.resume=auto"
ADMIN = "ask whoever runs the cluster"

EXACT = {
    "None": Reason("has not been looked at by the scheduler yet"),
    "Priority": Reason("waits behind jobs of higher priority", "a shorter cluster.timeout_min may fit into a gap"),
    "Resources": Reason("is next, and waits until enough nodes are free"),
    "Dependency": Reason("waits for the jobs of cluster.dependency"),
    "DependencyNeverSatisfied": Reason(
        "waits for a job that has ended otherwise than cluster.dependency wants, and will wait for ever",
        "cancel it, and submit it with afterany",
    ),
    "BeginTime": Reason("waits for the time that it may begin at: after a requeue, Slurm lets some minutes pass"),
    "JobHeldUser": Reason("is held by its user", HELD),
    "JobHeldAdmin": Reason("is held by an administrator", ADMIN),
    "JobArrayTaskLimit": Reason(
        "waits for other jobs of its array", "cluster.array_parallelism says how many run at a time"
    ),
    "launch failed requeued held": Reason(
        "could not be started on its nodes and is held: most often a node's prolog failed, or a path is not there",
        "see the end of the job's output and `scontrol show node`, exclude that node (cluster.exclude), then " + HELD,
    ),
    "job requeued in held state": Reason("was put back into the queue and is held", HELD),
    "launch failure limit exceeded requeued held": Reason(
        "failed to start too often and is held", "exclude the nodes that it failed on (cluster.exclude), then " + HELD
    ),
    "PartitionConfig": Reason(
        "asks for what its partition does not have, and will wait for ever",
        "lower cluster.nodes or cluster.timeout_min, or choose another cluster.partition",
    ),
    "PartitionDown": Reason("waits for its partition, which is down", "choose another: cluster.partition"),
    "PartitionInactive": Reason("waits for its partition, which takes no jobs", "choose another: cluster.partition"),
    "PartitionNodeLimit": Reason(
        "asks for more nodes than its partition has or allows", "lower cluster.nodes, or choose cluster.partition"
    ),
    "PartitionTimeLimit": Reason(
        "asks for more time than its partition allows", "lower cluster.timeout_min: the run goes on after a requeue"
    ),
    "ReqNodeNotAvail": Reason(
        "waits for nodes that are down, drained or reserved", "sinfo -R says why; cluster.nodes may be too many"
    ),
    "NodeDown": Reason("waits for a node that is down", "sinfo -R says why"),
    "BadConstraints": Reason("asks for what no node has", "see cluster.constraint, cluster.gres and cluster.mem"),
    "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions": Reason(
        "waits for nodes that are down, drained, or reserved for others", "sinfo -R says why"
    ),
    "Reservation": Reason("waits for its reservation to begin"),
    "ReservationDeleted": Reason("waits for a reservation that is gone", "submit it without"),
    "Licenses": Reason("waits for a licence"),
    "Cleaning": Reason("is put back into the queue once its last attempt is cleaned up"),
    "Prolog": Reason("waits for its nodes' prolog to end"),
    "FrontEndDown": Reason("waits for a front end that is down", ADMIN),
    "InactiveLimit": Reason("reached the partition's limit of idling", ADMIN),
    "NonZeroExitCode": Reason(
        "ended with an exit code other than 0", "see the end of its output: shoestring logs {run}"
    ),
    "RaisedSignal": Reason("was ended by a signal", "see the end of its output: shoestring logs {run}"),
    "OutOfMemory": Reason("took more memory than it had asked for", "raise cluster.mem, or 0 for all of a node"),
    "TimeLimit": Reason("reached its time limit", RESUME),
    "NodeFailure": Reason("lost a node", RESUME),
    "JobLaunchFailure": Reason("could not be started on its nodes", "see `scontrol show node`, and cluster.exclude"),
    "SystemFailure": Reason("Slurm itself failed", ADMIN),
    "BurstBufferResources": Reason("waits for room in a burst buffer"),
    "BurstBufferStageIn": Reason("waits for its data in a burst buffer"),
    "BurstBufferOperation": Reason("failed at a burst buffer", ADMIN),
    "InvalidAccount": Reason("has an account that Slurm does not know", "see cluster.account"),
    "AccountNotAllowed": Reason("has an account that its partition does not take", "see cluster.account"),
    "InvalidQOS": Reason("has a quality of service that Slurm does not know", "see cluster.qos"),
    "QOSNotAllowed": Reason("has a quality of service that its partition does not take", "see cluster.qos"),
    "AssociationJobLimit": Reason("waits: its account has as many jobs as it may", SMALLER),
    "AssociationResourceLimit": Reason("waits: its account has as much as it may", SMALLER),
    "AssociationTimeLimit": Reason("waits: its account has used up its time", ADMIN),
    "DeadLine": Reason("cannot end before its deadline"),
    "SchedDefer": Reason("waits for the scheduler's next look at it"),
    "MaxRequeue": Reason("was put back into the queue as often as Slurm allows", HELD),
    "ReservationMaxJobs": Reason("waits: its reservation runs as many jobs as it may"),
}
PATTERNS = (
    (
        r"ReqNodeNotAvail.*?Unavailable ?Nodes: ?(.+?)\)?$",
        "waits for nodes that are not there: {0}",
        "sinfo -R says why",
    ),
    (
        r"QOSMax(\w+?)Limit|QOSMax(\w+)",
        "asks for more than its quality of service allows a job or a user: {0}",
        SMALLER,
    ),
    (r"QOSMin(\w+)", "asks for less than its quality of service wants: {0}", "see cluster.qos"),
    (r"(?:QOSGrp|QOS)(\w+)", "waits: all jobs of its quality of service have as much as they may: {0}", SMALLER),
    (r"AssocMax(\w+)", "asks for more than its account allows: {0}", SMALLER),
    (r"(?:AssocGrp|Assoc)(\w+)", "waits: all jobs of its account have as much as they may: {0}", SMALLER),
    (r"Max(\w+)PerAccount", "waits: its account has as much as it may: {0}", SMALLER),
)
# States of a job, in words; what comes of a reason is said behind it.
STATES = {
    "PENDING": "waiting",
    "CONFIGURING": "its nodes are being made ready",
    "RUNNING": "running",
    "COMPLETING": "ending",
    "SUSPENDED": "suspended",
    "STOPPED": "stopped by a signal",
    "SIGNALING": "being told of its end",
    "STAGE_OUT": "ending: its data leave a burst buffer",
    "RESIZING": "changing its size",
    "REQUEUED": "put back into the queue",
    "REQUEUE_FED": "put back into the queue",
    "REQUEUE_HOLD": "put back into the queue, and held",
    "RESV_DEL_HOLD": "held: its reservation is gone",
    "SPECIAL_EXIT": "put back into the queue, and held: it ended in a way that its owner marked",
    "COMPLETED": "over",
    "CANCELLED": "cancelled",
    "FAILED": "failed",
    "TIMEOUT": "out of time",
    "NODE_FAIL": "ended: it lost a node",
    "PREEMPTED": "ended: preempted",
    "OUT_OF_MEMORY": "ended: out of memory",
    "DEADLINE": "ended: it could not meet its deadline",
    "BOOT_FAIL": "ended: a node did not come up",
    "REVOKED": "ended: another cluster has it",
}
# Those whose reason is that of their end, not what they had waited for.
ENDED = ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
ALIVE = frozenset(list(STATES)[: list(STATES).index("COMPLETED")])


def explain(reason: str, job: str, run: str) -> str:
    """``reason``, as Slurm gives it, in words, with what to do about it for job ``job`` of run ``run``."""
    plain = reason.strip("()").replace("_", " ")
    found = EXACT.get(reason) or EXACT.get(plain)
    for pattern, words, advice in PATTERNS if found is None else ():
        if match := re.match(pattern, reason):
            what = next(filter(None, match.groups()), "")
            found = Reason(words.format(_split(what) if what.isalpha() else what), advice)
            break
    if found is None:
        found = EXACT.get(plain.partition(",")[0], Reason(f"Slurm says: {reason}"))
    return str(found).replace("{job}", job).replace("{run}", run)


def _split(name: str) -> str:
    """``GRESPerUser`` -> ``GRES per user``."""
    words = re.findall(r"[A-Z]+(?=[A-Z][a-z]|$)|[A-Z]?[a-z]+|\d+", name)
    return " ".join(word if word.isupper() else word.lower() for word in words)
