from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gossamer.errors import RunError
from gossamer.run.atomic import (
    check_space,
    publish_folder,
    readable_bytes,
    recover_folder,
    storage_errors,
    write_bytes,
    write_text,
)
from gossamer.run.workspace import Run


def artifact(folder: Path, content: str) -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "gossamer.json").write_text("{}")
    (folder / "deep" / "weights").write_text(content)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a small file system with the given options; needs root and the right to mount."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mounted: list[Path] = []

    def mount_at(options: str) -> Path:
        folder = tmp_path / "mounted"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False
        )
        if done.returncode != 0:
            pytest.skip(f"cannot mount here: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield mount_at
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "old é")
    write_text(path, "new é")
    assert path.read_bytes() == "new é".encode()
    assert names(path.parent) == ["file.txt"]


def test_a_write_that_fails_leaves_the_old_content(mount: Callable[[str], Path]) -> None:
    folder = mount("size=64k")
    write_text(folder / "file", "old")
    with pytest.raises(RunError) as caught:
        write_bytes(folder / "file", bytes(200_000))
    assert "200 kB needed" in caught.value.message
    assert "free" in caught.value.message
    assert "--out" in caught.value.hint
    assert (folder / "file").read_text() == "old"
    assert names(folder) == ["file"]


def test_a_full_disk_stops_a_step_and_leaves_nothing_half_written(mount: Callable[[str], Path]) -> None:
    folder = mount("size=256k")
    with Run(folder / "run", {"goal": "x"}) as run:

        def fill(scratch: Path) -> int:
            for number in range(100):
                (scratch / str(number)).write_bytes(bytes(10_000))
            return 1

        with pytest.raises(RunError, match=r"is full: 1 MB needed, .* free"):
            run.step("export", {}, fill, needed_bytes=1_000_000)
        with pytest.raises(RunError, match="is full"):
            run.step("export", {}, fill)
        assert not any((folder / "run" / "steps").iterdir())
        assert not any((folder / "run" / "scratch").iterdir())
        step = run.step("export", {"smaller": True}, lambda scratch: (scratch / "a").write_bytes(bytes(10_000)))
        assert step.value == 10_000
        assert [entry["event"] for entry in run.journal()] == ["started", "failed", "started", "finished"]


def test_publishing_to_a_full_disk_keeps_the_old_folder(tmp_path: Path, mount: Callable[[str], Path]) -> None:
    folder = mount("size=128k")
    publish_folder(artifact(tmp_path / "old", "old"), folder / "out")
    with pytest.raises(RunError, match="is full"):
        publish_folder(artifact(tmp_path / "new", "n" * 300_000), folder / "out")
    assert (folder / "out" / "deep" / "weights").read_text() == "old"
    assert names(folder) == ["out"]


def test_a_read_only_disk_is_refused(tmp_path: Path, mount: Callable[[str], Path]) -> None:
    folder, source = mount("ro"), artifact(tmp_path / "source", "1")
    attempts: list[Callable[[], object]] = [
        lambda: Run(folder / "run", {}),
        lambda: Run(folder, {}),
        lambda: write_text(folder / "file", "x"),
        lambda: publish_folder(source, folder / "out"),
    ]
    for attempt in attempts:
        with pytest.raises(RunError, match="cannot be written: Read-only file system") as caught:
            attempt()
        assert "--out" in caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o500)
    with pytest.raises(RunError, match="cannot be written: Permission denied"):
        Run(tmp_path / "mine" / "run", {})


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match="is in the way"):
            Run(folder, {})
    assert (tmp_path / "file").read_text() == "mine"


def test_words_of_other_languages_for_a_full_disk_are_understood(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="5 MB needed"), storage_errors(tmp_path, 5_000_000):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_errors_that_are_not_about_the_folder_pass_through(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), storage_errors(tmp_path / "run"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/model.safetensors")
    with pytest.raises(ValueError, match="mine"), storage_errors(tmp_path):
        raise ValueError("mine")


def test_space_is_checked_before(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(RunError, match=r"1e\+06 TB needed, .* free"):
        check_space(tmp_path, 10**18)


def test_a_folder_is_published_as_a_copy_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "to" / "out"
    first, second = artifact(tmp_path / "first", "1"), artifact(tmp_path / "second", "2")
    (first / "only-in-first").write_text("x")
    for source in (first, second):
        publish_folder(source, target)
        assert (target / "deep" / "weights").read_text() == (source / "deep" / "weights").read_text()
        assert names(target) == names(source)
    assert names(target.parent) == ["out"]


def test_somebody_elses_folder_is_never_replaced(tmp_path: Path) -> None:
    source, target = artifact(tmp_path / "source", "1"), tmp_path / "home"
    target.mkdir()
    publish_folder(source, target)  # an empty folder is anybody's
    (target / "gossamer.json").unlink()
    with pytest.raises(RunError, match="not written by gossamer"):
        publish_folder(source, target)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="not written by gossamer"):
        publish_folder(source, tmp_path / "file")
    assert (target / "deep" / "weights").exists()


def test_a_publish_killed_between_its_renames_is_undone(tmp_path: Path) -> None:
    target = artifact(tmp_path / "out", "old")
    artifact(tmp_path / ".out.arriving", "new")
    target.rename(tmp_path / ".out.leaving")
    recover_folder(target)
    assert (target / "deep" / "weights").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (90_900_000, "90.9 MB"), (10**13, "10 TB")]
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert readable_bytes(count) == text
