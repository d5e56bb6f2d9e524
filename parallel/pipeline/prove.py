"""What programs must hold before processes run them, whoever made them. Every refusal names rank, step and reason.

    same        without its exchanges, a rank's program is its list of the schedule
    whole       a tensor that an action reads and another rank made has been received before it, from the rank that made
                it; it is sent once, after it was made; nothing is received that is not read
    paired      what travels between two ranks, either way, is in one order in both their programs
    progress    ranks never wait in a circle, even if they go on from an exchange only when all their peers have come to
                their ends of it, as where a send blocks until it is received

All four are linear in the number of steps.
"""

from collections import defaultdict, deque
from collections.abc import Iterator

from parallel.pipeline.action import Action, Op, Schedule, parts
from parallel.pipeline.lower import Exchange, Kind, Program, Transfer, What

Tensor = tuple[What, int, int]  # what, the stage that made it, micro-batch


def prove(program: Program) -> None:
    """ValueError for a program that ranks could not run; its schedule is taken to be valid."""
    schedule = program.schedule
    if len(program.lists) != schedule.ranks:
        raise ValueError(f"{schedule.name} has {len(program.lists)} programs for {schedule.ranks} ranks")
    makers, readers = _ends(schedule)
    for rank in range(schedule.ranks):
        _check_same(program, rank)
        _check_whole(program, rank, makers, readers)
    _check_paired(program)
    _check_progress(program)


def _say(program: Program, rank: int, step: int, reason: str) -> str:
    steps = program.lists[rank]
    return f"rank {rank}, step {step}{f' {str(steps[step])!r}' if step < len(steps) else ''}: {reason}"


def _made(action: Action) -> Tensor | None:
    """What an action makes for another stage."""
    if action.op is Op.W:
        return None
    return (What.activation if action.op is Op.F else What.gradient), action.stage, action.microbatch


def _read(action: Action, stages: int) -> Tensor | None:
    """What an action reads from another stage."""
    if action.op is Op.F:
        return (What.activation, action.stage - 1, action.microbatch) if action.stage > 0 else None
    if action.op is Op.W or action.stage == stages - 1:
        return None
    return What.gradient, action.stage + 1, action.microbatch


def _ends(schedule: Schedule) -> tuple[dict[Tensor, int], dict[Tensor, int]]:
    """The ranks that make and that read each tensor."""
    makers, readers = {}, {}
    for rank, computes in enumerate(schedule.lists):
        for compute in computes:
            for action in parts(compute):
                if (made := _made(action)) is not None:
                    makers[made] = rank
                if (read := _read(action, schedule.stages)) is not None:
                    readers[read] = rank
    return makers, readers


def _check_same(program: Program, rank: int) -> None:
    wanted = iter(program.schedule.lists[rank])
    for step, each in enumerate(program.lists[rank]):
        if not isinstance(each, Exchange) and each != (compute := next(wanted, None)):
            raise ValueError(_say(program, rank, step, f"the schedule has {compute or 'nothing'} here"))
    if (left := next(wanted, None)) is not None:
        raise ValueError(_say(program, rank, len(program.lists[rank]), f"{left} of the schedule is missing"))


def _check_whole(program: Program, rank: int, makers: dict[Tensor, int], readers: dict[Tensor, int]) -> None:
    """Tensors of one rank: made or received before they are read or sent, from and to the right ranks, once."""
    here: set[Tensor] = set()  # made here and not yet sent, or received and not yet read
    for step, each in enumerate(program.lists[rank]):
        if isinstance(each, Exchange):
            for transfer in each.transfers:
                if reason := _refuse(transfer, rank, makers, readers, here):
                    raise ValueError(_say(program, rank, step, f"{transfer} {reason}"))
            continue
        for action in parts(each):
            read = _read(action, program.schedule.stages)
            if read is not None and makers[read] != rank:
                if read not in here:
                    raise ValueError(_say(program, rank, step, f"{_name(read)} has not been received"))
                here.remove(read)
        for action in parts(each):
            made = _made(action)
            if made is not None and readers.get(made, rank) != rank:
                here.add(made)
    for tensor in sorted(here):
        reason = "is never sent" if makers[tensor] == rank else "is received and never read"
        raise ValueError(_say(program, rank, len(program.lists[rank]), f"{_name(tensor)} {reason}"))


def _refuse(
    transfer: Transfer, rank: int, makers: dict[Tensor, int], readers: dict[Tensor, int], here: set[Tensor]
) -> str:
    """Why a rank cannot have a transfer where it stands, or nothing; takes it into account in ``here``."""
    tensor = (transfer.what, transfer.stage, transfer.microbatch)
    sends = transfer.kind is Kind.send
    maker, reader = makers.get(tensor), readers.get(tensor)
    if maker is None or reader is None or maker == reader:
        return "need not travel"
    if (maker, reader) != ((rank, transfer.peer) if sends else (transfer.peer, rank)):
        return f"goes from rank {maker} to rank {reader}"
    if sends == (tensor not in here):
        return "is not there to be sent: not made yet, or sent already" if sends else "is received twice"
    (here.remove if sends else here.add)(tensor)
    return ""


def _name(tensor: Tensor) -> str:
    what, stage, microbatch = tensor
    return f"{what} {stage}{'F' if what is What.activation else 'B'}{microbatch}"


def _transfers(program: Program, rank: int) -> Iterator[tuple[int, Transfer]]:
    return (
        (step, transfer)
        for step, each in enumerate(program.lists[rank])
        if isinstance(each, Exchange)
        for transfer in each.transfers
    )


def _check_paired(program: Program) -> None:
    """Between two ranks: the k-th transfer of one is the other end of the k-th of the other."""
    queues: dict[tuple[int, int], deque[tuple[int, Transfer]]] = defaultdict(deque)
    for rank in range(len(program.lists)):
        for step, transfer in _transfers(program, rank):
            if transfer.peer > rank:
                queues[rank, transfer.peer].append((step, transfer))
                continue
            queue = queues[transfer.peer, rank]
            wanted = _other_end(transfer, rank)
            if not queue or queue[0][1] != wanted:
                there = f"its next transfer with rank {rank} is {queue[0][1]}" if queue else "there is no other"
                raise ValueError(_say(program, rank, step, f"{transfer} is not what rank {transfer.peer} has: {there}"))
            queue.popleft()
    for (rank, peer), queue in queues.items():
        for step, transfer in queue:
            raise ValueError(_say(program, rank, step, f"{transfer} has no other end on rank {peer}"))


def _other_end(transfer: Transfer, rank: int) -> Transfer:
    kind = Kind.receive if transfer.kind is Kind.send else Kind.send
    return transfer._replace(kind=kind, peer=rank)


def _check_progress(program: Program) -> None:
    """Run all ranks as far as they come, an exchange ending when both ends of all that is in it are posted."""
    heads, missing = [0] * len(program.lists), [0] * len(program.lists)
    posted: set[tuple[Tensor, int, int]] = set()  # tensor, from, to: one end only
    ready = deque(range(len(program.lists)))
    while ready:
        rank = ready.popleft()
        steps = program.lists[rank]
        while not missing[rank] and heads[rank] < len(steps):
            step = steps[heads[rank]]
            heads[rank] += 1
            for transfer in step.transfers if isinstance(step, Exchange) else ():
                key, peer = _route(transfer, rank), transfer.peer
                if key not in posted:
                    posted.add(key)
                    missing[rank] += 1
                    continue
                posted.remove(key)
                missing[peer] -= 1
                if not missing[peer]:
                    ready.append(peer)
    stuck = next((rank for rank, left in enumerate(missing) if left), None)
    if stuck is not None:
        step = program.lists[stuck][heads[stuck] - 1]
        assert isinstance(step, Exchange)
        open_ends = [transfer for transfer in step.transfers if _route(transfer, stuck) in posted]
        reason = f"waits in a circle of exchanges, for {', '.join(map(str, open_ends))}"
        raise ValueError(_say(program, stuck, heads[stuck] - 1, reason))


def _route(transfer: Transfer, rank: int) -> tuple[Tensor, int, int]:
    kind, what, stage, microbatch, peer = transfer
    return (what, stage, microbatch), *((rank, peer) if kind is Kind.send else (peer, rank))
