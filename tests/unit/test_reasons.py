"""Why a job waits, in words: every reason that Slurm has gets some, and those of a user's own making say what to do."""

import pytest

from launcher.slurm.reasons import ALIVE, ENDED, EXACT, STATES, explain

# As squeue 22.05 and scontrol write them, and what the words have to contain.
SEEN = {
    "Priority": "waits behind jobs of higher priority",
    "Resources": "is next",
    "(Resources)": "is next",
    "Dependency": "waits for the jobs of cluster.dependency",
    "DependencyNeverSatisfied": "will wait for ever; cancel it, and submit it with afterany",
    "JobHeldUser": "is held by its user; release it: scontrol release 7",
    "launch_failed_requeued_held": "is held: most often a node's prolog failed",
    "launch failed requeued held": "then release it: scontrol release 7",
    "job_requeued_in_held_state": "was put back into the queue and is held; release it",
    "JobArrayTaskLimit": "cluster.array_parallelism",
    "QOSMaxGRESPerUser": "asks for more than its quality of service allows a job or a user: GRES per user",
    "QOSMaxWallDurationPerJobLimit": "a job or a user: wall duration per job",
    "QOSGrpNodeLimit": "waits: all jobs of its quality of service have as much as they may: node limit",
    "QOSMinGRES": "asks for less than its quality of service wants: GRES",
    "AssocGrpCPUMinutesLimit": "waits: all jobs of its account have as much as they may: CPU minutes limit",
    "AssocMaxJobsLimit": "asks for more than its account allows: jobs limit",
    "MaxGRESPerAccount": "waits: its account has as much as it may: GRES",
    "ReqNodeNotAvail, UnavailableNodes:n[1-2]": "waits for nodes that are not there: n[1-2]; sinfo -R says why",
    "ReqNodeNotAvail,_UnavailableNodes:n1": "waits for nodes that are not there: n1",
    "ReqNodeNotAvail, May be reserved for other job": "waits for nodes that are down, drained or reserved",
    "(Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions)": "sinfo -R",
    "PartitionTimeLimit": "lower cluster.timeout_min",
    "InvalidQOS": "cluster.qos",
    "OutOfMemory": "raise cluster.mem",
    "TimeLimit": "shoestring submit with run.id=mine checkpoint.resume=auto",
    "NonZeroExitCode": "shoestring logs mine",
    "SomethingOfTomorrow": "Slurm says: SomethingOfTomorrow",
}


@pytest.mark.parametrize("reason", SEEN)
def test_a_reason_in_words(reason: str) -> None:
    assert SEEN[reason] in explain(reason, "7", "mine")


def test_no_words_have_a_gap_left_in_them() -> None:
    for reason in EXACT:
        said = explain(reason, "7", "mine")
        assert ("{" not in said and "Slurm says" not in said and said[0].islower()) or said.startswith("Slurm itself")


def test_a_job_is_alive_or_over() -> None:
    assert {"PENDING", "RUNNING", "COMPLETING", "REQUEUE_HOLD", "SPECIAL_EXIT"} <= ALIVE
    over = {"COMPLETED", "CANCELLED", "PREEMPTED", *ENDED}
    assert over <= STATES.keys() and not over & ALIVE
