"""An evaluation's folder: what is asked, and what came of it. Ranks that find a request in their folder do not train.

runs/<id>/evaluations/<time>/config.yaml    the run's configuration, with the layout and the rest of the command line
                             request.json   which weights, on which texts
                             result.json    what came of it: in each text's row the loss in nats a token, bits a byte
                             logs/          of several ranks
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema import RunConfig
from training.checkpoint.place import replace_text
from training.kept import Kept

if TYPE_CHECKING:
    from parallel.mesh import Mesh
    from training.assess import Score

FOLDER, REQUEST, RESULT = "evaluations", "request.json", "result.json"
COLUMNS = f"{'text':<20}{'nats/token':>12}{'perplexity':>12}{'bits/byte':>11}{'tokens':>16}{'of':>18}"


@dataclass(frozen=True, slots=True)
class Request:
    """What is measured, and on what."""

    kept: Kept
    sets: Mapping[str, str]  # texts by name; none: what the run holds out
    tokens: int = 0  # of each; 0: all
    tasks: tuple[str, ...] = ()  # of lm-eval's harness, in place of texts


def make(home: Path, config: RunConfig, request: Request) -> Path:
    """A new folder for an evaluation, in that of a run."""
    from launcher.tree import describe

    stem = f"{datetime.now():%Y%m%d-%H%M%S}"
    for number in count(1):
        path = home / FOLDER / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"{path} cannot be made, for what comes of it: {error}") from error
        (path / "config.yaml").write_text(describe(config), encoding="utf-8")
        (path / REQUEST).write_text(json.dumps(asdict(request), indent=2) + "\n", encoding="utf-8")
        return path
    raise AssertionError("counting never ends")


def read(path: Path) -> Request | None:
    """What ``path`` asks for; None where it is the folder of something else."""
    if not (path / REQUEST).is_file():
        return None
    content = json.loads((path / REQUEST).read_text(encoding="utf-8"))
    return Request(Kept(**content["kept"]), content["sets"], content["tokens"], tuple(content["tasks"]))


def serve(mesh: "Mesh", config: RunConfig, path: Path, request: Request) -> None:
    """Does it, as one rank; the first prints a table and writes the result. Collective."""
    from training.assess import assess

    first = mesh.rank == 0
    scores = assess(mesh, config, request.kept, dict(request.sets), request.tokens, print if first else _say_nothing)
    if not first:
        return
    print(f"{request.kept.place} after step {request.kept.step}", COLUMNS, sep="\n")
    print("\n".join(show(name, score) for name, score in scores.items()), flush=True)
    keep(path, config, request.kept, sets={name: write(score._asdict()) for name, score in scores.items()})


def keep(path: Path, config: RunConfig, kept: Kept, **found: Any) -> None:
    """Writes what was ``found`` of the weights ``kept``."""
    about = {"checkpoint": kept.place, "step": kept.step, "average": kept.average, "precision": config.precision}
    replace_text(path / RESULT, json.dumps({**about, **found}, indent=2, allow_nan=False) + "\n")


def show(name: str, score: "Score") -> str:
    """A line of the table."""
    perplexity = math.exp(score.loss) if score.loss < 700 else math.inf
    bits = "-" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
    return f"{name:<20}{score.loss:>12.4f}{perplexity:>12.4g}{bits:>11}{score.labels:>16,}{score.tokens:>18,}"


def write(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has them, which has no NaN."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def _say_nothing(line: str) -> None:
    pass
