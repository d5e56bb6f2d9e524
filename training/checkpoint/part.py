"""What a rank does in the background: its file, and its part of the manifest; on rank 0 then all parts as one."""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from parallel.doing import doing
from training.checkpoint.files import Values, name_file, write_file
from training.checkpoint.manifest import MANIFEST, DamagedError, Manifest, Stored, join, parse, write
from training.checkpoint.place import Place, replace_text, sync
from training.chunk import Chunk

FAILURES = (OSError, DamagedError)  # what both may raise, through no fault of ours


@doing("writing a checkpoint")
def write_part(
    folder: Place, rank: int, chunks: Sequence[Chunk], facts: Mapping[str, Any], values: Values = attrgetter("tensor")
) -> int:
    """Writes what ``rank`` has of a checkpoint, which lies in host memory, or whose ``values`` are made as they are
    written. The bytes of its values.

    Raises OSError, naming the file and the tensor, where there is no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Stored] = {}
    for name, shape, dtype, piece in write_file(folder / name_file(rank), chunks, values):
        known = tensors.get(name)
        tensors[name] = Stored(shape, dtype, (*(known.pieces if known else ()), piece))
    part = Manifest(tensors, facts)
    replace_text(_locate(folder, rank), write(part))
    return part.count_bytes()


@doing("committing a checkpoint")
def commit(folder: Place, ranks: int) -> int:
    """Makes one manifest of the parts of all ranks: from now on there is a checkpoint. The bytes of its values.

    Raises OSError where it cannot be written, DamagedError where the parts are not as written.
    """
    parts = [_locate(folder, rank) for rank in range(ranks)]
    manifest = join(parse(path.read_text(encoding="utf-8"), str(path)) for path in parts)
    manifest.check(str(folder))
    replace_text(folder / MANIFEST, write(manifest))
    sync(folder.parent)
    for path in parts:
        path.unlink()
    return manifest.count_bytes()


def _locate(folder: Place, rank: int) -> Place:
    return folder / f"{rank:05}.json"
