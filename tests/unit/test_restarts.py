"""How far a run is known to have come, when its ranks are started again."""

import json
from pathlib import Path

from launcher.restarts import find_newest
from training.checkpoint.folders import FOLDER, locate
from training.checkpoint.manifest import MANIFEST


def test_a_run_that_goes_on_by_near_copies_comes_further(tmp_path: Path) -> None:
    assert find_newest(tmp_path, tmp_path / "checkpoints") == 0
    folder = locate(tmp_path / FOLDER, 5)
    folder.mkdir(parents=True)
    (folder / MANIFEST).touch()
    assert find_newest(tmp_path, tmp_path / "checkpoints") == 5
    rows = [{"kind": "resume", "step": 6}, {"kind": "step", "step": 8}, {"kind": "resume", "step": 7}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "re')
    assert find_newest(tmp_path, tmp_path / "checkpoints") == 7
    rows[-1]["step"] = 3
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert find_newest(tmp_path, tmp_path / "checkpoints") == 5
