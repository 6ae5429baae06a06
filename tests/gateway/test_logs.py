"""What dead replicas printed is kept, though not for ever."""

from __future__ import annotations

import os
from pathlib import Path

from gateway.logs import known_replicas, prune


def printed(home: Path, n: int) -> Path:
    """Replica n, which printed something at second n."""
    folder = home / "replicas" / f"svc-gw-0a1b2c3d-{n}"
    folder.mkdir(parents=True)
    (folder / "output.log").write_text("ready")
    os.utime(folder / "output.log", (n, n))
    return folder


def test_only_the_last_outputs_of_dead_replicas_are_kept(tmp_path: Path) -> None:
    folders = [printed(tmp_path, n) for n in range(1, 7)]
    (folders[1] / "process.json").write_text("{}")  # not verified gone
    foreign = tmp_path / "replicas" / "Notes of a person"
    foreign.mkdir()
    (foreign / "output.log").touch()
    os.utime(foreign / "output.log", (0, 0))
    live = {folders[0].name}  # silent for long, but alive
    assert prune(tmp_path, live, keep=2) == [folders[3].name, folders[2].name]
    left = {replica["id"] for replica in known_replicas(tmp_path)}
    assert left == {folders[i].name for i in (0, 1, 4, 5)}
    assert foreign.is_dir()
    assert prune(tmp_path, live, keep=2) == []
