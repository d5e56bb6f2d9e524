"""What a manifest says of the run besides its tensors: that it is there, and of which model.

    run   {"step": 100, "tokens": 25600, ..., "topology": {"pp": 1, ...}, "config": {"model": {...}, ...}}

Only what a run needs to go on, or ``shoestring checkpoint`` to speak of it, has to be there. Standard library only.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, cast, get_type_hints

from model.config import ModelConfig
from training.checkpoint.manifest import DamagedError, Manifest

WHOLE = "a whole number that is not negative"
WANTED: dict[str, Any] = {  # docs/checkpoint-format.md says what they are
    **dict.fromkeys(("step", "tokens", "updates", "since_move", "skipped"), WHOLE),
    "seconds": "a number",
    "topology": dict.fromkeys(("pp", "dp", "cp", "tp", "ep"), WHOLE),
    "config": {"model": "a section", "precision": "a name", "parallel": {"engine": "a name"}},
}
KINDS: dict[str, type | tuple[type, ...]] = {WHOLE: int, "a number": (int, float), "a section": dict, "a name": str}


def check_facts(manifest: Manifest, where: str) -> None:
    """Raises DamagedError, naming ``where`` and the key, for a fact that is missing or is something else."""
    _check(WANTED, manifest.run, "run", where)


def check_model(manifest: Manifest, model: Mapping[str, Any], folder: str, advice: str) -> None:
    """Raises ValueError, naming the first key and giving ``advice``, where ``model`` is not the checkpoint's.

    A key that there was not yet when the checkpoint was made had the value that it has by default.
    """
    here, there = _flatten(model), _flatten(manifest.run["config"]["model"])
    there |= {key: value for key, value in list_defaults(ModelConfig).items() if key not in there and key in here}
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            raise ValueError(
                f"model.{key}={here.get(key)} must be {there.get(key)}, as in the checkpoint {folder}: {advice}"
            )


def has_average(manifest: Manifest) -> bool:
    """Whether there is one of the weights (training/average.py)."""
    return any(name.startswith("ema/") for name in manifest.tensors)


def _check(wanted: Mapping[str, Any], found: Any, key: str, where: str) -> None:
    if not isinstance(found, Mapping):
        raise DamagedError(f"{where}: {key} must be a section, not {found!r}")
    for name, kind in wanted.items():
        if name not in found:
            raise DamagedError(f"{where}: {key}.{name} is missing")
        if isinstance(kind, dict):
            _check(kind, found[name], f"{key}.{name}", where)
        elif not isinstance(found[name], KINDS[kind]) or (kind is WHOLE and found[name] < 0):
            raise DamagedError(f"{where}: {key}.{name} must be {kind}, not {found[name]!r}")


def list_defaults(section: type[Any], prefix: str = "") -> dict[str, Any]:
    """What the keys of a section of a configuration are by default, those of its own sections included."""
    found: dict[str, Any] = {}
    hints = get_type_hints(section)
    for field in fields(section):
        if is_dataclass(inner := hints[field.name]):
            found |= list_defaults(cast(type[Any], inner), f"{prefix}{field.name}.")
        elif field.default is not MISSING:
            found[prefix + field.name] = list(field.default) if isinstance(field.default, tuple) else field.default
    return found


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys with dots between; tuples as the lists that JSON makes of them."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
