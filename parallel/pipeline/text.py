"""Schedules as text: one line a rank, one word an action; what ``shoestring schedule`` prints can be read back.

# 1f1b: 2 ranks, 2 stages, 3 micro-batches        from # to the end of a line is for people
0F0 0F1 0B0 0F2 0B1 0B2                           stage, op (F, B, I or W), micro-batch
1F0 1B0 1F1 1B1 1F2 1B2                           an overlapped pair: 1F1&1B0; a rank without work: -
"""

import re
from pathlib import Path

from parallel.pipeline.action import Action, Compute, Op, Overlap, Schedule, parts

ACTION = re.compile(r"([0-9]{1,7})([FBIW])([0-9]{1,7})")
IDLE = "-"


def render(schedule: Schedule) -> str:
    """The lists of a schedule; ``parse`` reads them back."""
    title = f"{schedule.name}: {schedule.ranks} ranks, {schedule.stages} stages, {schedule.microbatches} micro-batches"
    return "\n".join([f"# {title}", *(" ".join(map(str, computes)) or IDLE for computes in schedule.lists), ""])


def parse(text: str, name: str) -> Schedule:
    """The schedule that ``text`` spells; stages and micro-batches are counted by their largest numbers.

    Raises ValueError with line and word for what is no action. Whether ranks can run it is for ``validate`` to say.
    """
    lists = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if words:
            read = () if words == [IDLE] else (_read(word, number, place) for place, word in enumerate(words, start=1))
            lists.append(tuple(read))
    actions = [action for computes in lists for compute in computes for action in parts(compute)]
    if not actions:
        raise ValueError(
            f"{name}: there is no action in it; a line holds the actions of a rank, as in: 0F0 0F1 0B0 0B1"
        )
    stages = 1 + max(action.stage for action in actions)
    microbatches = 1 + max(action.microbatch for action in actions)
    return Schedule(name, len(lists), microbatches, stages, tuple(lists))


def load(path: Path) -> Schedule:
    """The schedule in a file, called by the file's name; ValueError as ``parse`` or if it cannot be read."""
    try:
        return parse(path.read_text(encoding="utf-8"), path.stem)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a schedule: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read(word: str, line: int, place: int) -> Compute:
    matches = [ACTION.fullmatch(part) for part in word.split("&")]
    actions = [Action(Op(match[2]), int(match[1]), int(match[3])) for match in matches if match]
    if len(actions) == len(matches) == 1:
        return actions[0]
    if [action.op for action in actions] in ([Op.F, Op.B], [Op.F, Op.I]) and len(matches) == 2:
        return Overlap(*actions)
    raise ValueError(
        f'line {line}, word {place} "{word[:40]}": an action is stage, op (F, B, I or W) and micro-batch, as '
        "in 2F5; a pair is a forward & a backward (B or I) as in 2F5&0B1"
    )
