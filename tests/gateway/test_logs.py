"""What dead replicas printed is kept, though not for ever."""

from __future__ import annotations

import os
from pathlib import Path

from gateway.logs import Selected, follow, known_replicas, prune, read
from replicas.provisioners.keeping import before

DAY = 86_400.0
NOW = 1_800_000_000.0


def printed(home: Path, n: int, days_ago: float) -> Path:
    """Replica n, which printed its last so many days ago."""
    folder = home / "replicas" / f"svc-gw-0a1b2c3d-{n}"
    folder.mkdir(parents=True)
    (folder / "output.log").write_text("ready")
    for path in (folder / "output.log", folder):
        os.utime(path, (NOW - days_ago * DAY, NOW - days_ago * DAY))
    return folder


def test_what_dead_replicas_printed_goes_with_its_folder_after_14_days(tmp_path: Path) -> None:
    old, young = printed(tmp_path, 1, 14.1), printed(tmp_path, 2, 13.9)
    assert prune(tmp_path, (), NOW) == [old.name]
    assert (old.exists(), young.exists()) == (False, True)
    assert {replica["id"] for replica in known_replicas(tmp_path)} == {young.name}
    assert prune(tmp_path, (), NOW) == []
    assert prune(tmp_path / "nothing", (), NOW) == []


def test_the_youngest_file_counts_wherever_it_is(tmp_path: Path) -> None:
    folder = printed(tmp_path, 1, 30)
    (folder / "ranks").mkdir()
    (folder / "ranks" / "1.log").touch()
    os.utime(folder / "ranks" / "1.log", (NOW, NOW))
    assert prune(tmp_path, (), NOW + 13 * DAY) == []


def test_what_lives_may_run_or_is_no_replicas_stays_however_old(tmp_path: Path) -> None:
    alive, record = printed(tmp_path, 1, 30), printed(tmp_path, 2, 30)
    (record / "process.json").write_text("{}")  # not verified gone
    os.utime(record / "process.json", (0, 0))
    os.utime(record, (0, 0))
    foreign = tmp_path / "replicas" / "Notes of a person"
    foreign.mkdir()
    (tmp_path / "replicas" / "svc-gw-0a1b2c3d-3").symlink_to(foreign)
    for path in (foreign, tmp_path / "replicas"):
        os.utime(path, (0, 0))
    assert prune(tmp_path, {alive.name}, NOW) == []
    assert foreign.is_dir()


async def test_a_log_that_begins_anew_is_shown_and_followed_over_it(tmp_path: Path) -> None:
    path = tmp_path / "output.log"
    path.write_text("1\n2\n")
    text, offset = read(Selected(path), 2)
    live = [True]
    said = follow(Selected(path), text, offset, lambda: bool(live))
    assert await anext(said) == b"1\n2\n"
    with path.open("a") as old:
        old.write("3\n")
    path.rename(before(path))
    path.write_text("4\n")
    assert [await anext(said), await anext(said)] == [b"3\n", b"4\n"]
    live.clear()
    assert [piece async for piece in said] == []
    assert read(Selected(path), 3) == ("2\n3\n4\n", 2)
