"""Of which model a checkpoint says that it is, one from before some of the keys were there included."""

import json
from dataclasses import asdict

import pytest
from small_models import make_config

from training.checkpoint.facts import check_model
from training.checkpoint.manifest import Manifest


def test_a_checkpoint_from_before_a_key_was_there() -> None:
    """What it does not say was as it is by default; anything else is another model."""
    model = asdict(make_config())
    before = json.loads(json.dumps(model))
    for section, name in (("attention", "qk_norm"), ("attention", "kv_heads"), ("rope", "stretch"), ("moe", "skip")):
        del before[section][name]
    manifest = Manifest(tensors={}, run={"config": {"model": before}})
    check_model(manifest, model, "there", "")
    other = asdict(make_config(moe={"skip": (1,)}))
    with pytest.raises(ValueError, match=r"^model\.moe\.skip=\[1\] must be \[\], as in the checkpoint there"):
        check_model(manifest, other, "there", "")


def test_another_model_is_named() -> None:
    manifest = Manifest(tensors={}, run={"config": {"model": asdict(make_config())}})
    with pytest.raises(ValueError, match=r"^model\.hidden=14 must be 12, as in the checkpoint there: take it"):
        check_model(manifest, asdict(make_config(hidden=14)), "there", "take it")
