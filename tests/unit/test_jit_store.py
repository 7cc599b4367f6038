"""The cache under everything that happens to caches: races, kills, damage, full and read-only disks, other users."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deep_ep import jit
from deep_ep.errors import EPEnvironmentError
from deep_ep.jit import store as store_module
from tests.unit.jit_kit import TINY_KERNEL, FakeToolchain, build_text, run_tiny, start_python, wait_for, write_headers

FAKE = FakeToolchain()
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


@pytest.fixture
def store(tmp_path: Path) -> jit.Store:
    return jit.Store(tmp_path / "cache")


@pytest.fixture(autouse=True)
def _fresh_process_state() -> Iterator[None]:
    """Each test warns anew and has a private store of its own."""
    store_module.warn_once.cache_clear()
    store_module._private_store_of.cache_clear()
    yield
    shutil.rmtree(store_module.private_store().root, ignore_errors=True)
    store_module._private_store_of.cache_clear()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def files_of(store: jit.Store) -> set[str]:
    return {path.relative_to(store.root).parts[0] for path in store.root.rglob("*") if path.is_file()}


# The good case


def test_a_second_build_is_a_hit(store: jit.Store) -> None:
    first, second = build_text(FAKE, store), build_text(FAKE, store)
    assert (first.hit, second.hit) == (False, True)
    assert first.code == second.code == second.artifact.read_bytes() == b"some text"
    assert {path.name for path in second.folder.iterdir()} == {
        "source.txt",
        "artifact.txt",
        "command.txt",
        "log.txt",
        "manifest.json",
    }
    assert (second.folder / "command.txt").read_text() == "fake source.txt\n"
    assert second.log == first.log == "done\n"
    assert files_of(store) == {"kernels"}


def test_a_changed_header_is_a_miss(store: jit.Store, tmp_path: Path) -> None:
    toolchain = jit.Gxx(more_include_dirs=write_headers(tmp_path))
    assert run_tiny(jit.build(TINY_KERNEL, toolchain, store=store)) == [1, 7, 13, 19]
    write_headers(tmp_path, factor="constexpr int kFactor = 10;\n")
    changed = jit.build(TINY_KERNEL, toolchain, store=store)
    assert not changed.hit
    assert run_tiny(changed) == [1, 61, 121, 181]
    write_headers(tmp_path)
    assert jit.build(TINY_KERNEL, toolchain, store=store).hit


def test_a_header_edited_during_a_compile_is_compiled_again(store: jit.Store, tmp_path: Path) -> None:
    header = tmp_path / "header.h"
    header.write_text("// first\n")
    compiles = []

    def edit(folder: Path) -> None:
        compiles.append(folder)
        if len(compiles) == 1:
            header.write_text("// second\n")

    toolchain = FakeToolchain(include_dirs=(tmp_path,), meanwhile=edit)
    assert not build_text(toolchain, store, "#include <header.h>\n").hit
    assert len(compiles) == 2
    assert build_text(toolchain, store, "#include <header.h>\n").hit
    header.write_text("// first\n")
    assert not build_text(toolchain, store, "#include <header.h>\n").hit


def test_a_generous_umask_does_not_make_entries_writable(store: jit.Store) -> None:
    before = os.umask(0)
    try:
        build_text(FAKE, store)
        assert build_text(FAKE, store).hit
    finally:
        os.umask(before)
    assert not [path for path in (store.root, *store.root.rglob("*")) if path.stat().st_mode & 0o022]


# Races and kills

BUILD_AT_A_BARRIER = """
import sys
from pathlib import Path
from deep_ep import jit
from tests.unit.jit_kit import FakeToolchain, build_text, wait_for
root, me, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def meet(folder):
    (root / f"{me}.compiling").touch()
    wait_for((root / f"{other}.compiling").exists, "the other's compile")
built = build_text(FakeToolchain(meanwhile=meet), jit.Store(root / "cache"))
assert built.code == built.artifact.read_bytes() == b"some text"
print(built.hit, built.folder, flush=True)
"""


def test_two_processes_build_at_once(tmp_path: Path) -> None:
    children = [
        start_python(BUILD_AT_A_BARRIER, str(tmp_path), *names) for names in (("one", "other"), ("other", "one"))
    ]
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    folders = {Path(out.split()[1]) for out, _ in outputs}
    assert all(out.startswith("False") for out, _ in outputs)
    store = jit.Store(tmp_path / "cache")
    winners = [folder for folder in folders if folder.is_relative_to(store.root)]
    losers = folders - set(winners)
    assert len(winners) == 1
    assert len(losers) == 1, "the loser uses its own copy"
    assert not losers.pop().exists(), "and takes it away when it ends"
    assert build_text(FAKE, store).hit
    assert files_of(store) == {"kernels"}


BUILD_SLOWLY = """
import sys, time
from pathlib import Path
from deep_ep import jit
from tests.unit.jit_kit import FakeToolchain, build_text
def hang(folder):
    (folder / "artifact.txt").write_text("some t")
    Path(sys.argv[1], "compiling").touch()
    time.sleep(600)
build_text(FakeToolchain(meanwhile=hang), jit.Store(Path(sys.argv[1], "cache")))
"""


def test_a_killed_compile_disturbs_nobody_and_is_swept(tmp_path: Path, store: jit.Store) -> None:
    child = start_python(BUILD_SLOWLY, str(tmp_path))
    wait_for((tmp_path / "compiling").exists, "the compile")
    child.send_signal(signal.SIGKILL)
    child.communicate()
    (left,) = (store.root / "building").iterdir()
    assert (left / "artifact.txt").read_text() == "some t"

    built = build_text(FAKE, store)
    assert not built.hit
    assert built.code == b"some text"
    assert left.exists(), "it could be another host's compile that is under way"

    os.utime(left, (time.time() - 7200, time.time() - 7200))
    build_text(FAKE, store, "another text")
    assert not left.exists()
    assert files_of(store) == {"kernels"}


# Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["artifact.txt", "manifest.json", "log.txt"])
def test_a_damaged_entry_is_built_again(store: jit.Store, damage: Callable[[Path], None], name: str) -> None:
    first = build_text(FAKE, store)
    damage(first.folder / name)
    second = build_text(FAKE, store)
    assert not second.hit
    assert second.code == second.artifact.read_bytes() == b"some text"
    assert second.folder == first.folder, "in its place"
    assert build_text(FAKE, store).hit
    assert files_of(store) == {"kernels"}


@pytest.mark.parametrize("text", ["[]", "{}", '{"key": 1, "files": {}, "facts": {}}', '{"files": 3}'])
def test_a_manifest_of_something_else_is_no_entry(store: jit.Store, text: str) -> None:
    first = build_text(FAKE, store)
    (first.folder / "manifest.json").write_text(text)
    assert not build_text(FAKE, store).hit
    assert build_text(FAKE, store).hit


def test_an_entry_under_anothers_name_is_not_loaded(store: jit.Store) -> None:
    first, other = build_text(FAKE, store), build_text(FAKE, store, "another text")
    shutil.rmtree(first.folder)
    shutil.copytree(other.folder, first.folder)
    assert build_text(FAKE, store).code == b"some text"


def test_a_file_where_the_entry_should_be_does_not_stop_a_build(store: jit.Store) -> None:
    first = build_text(FAKE, store)
    shutil.rmtree(first.folder)
    first.folder.write_text("a file")
    assert build_text(FAKE, store).code == b"some text"


BUILD_AND_DAMAGE = """
import contextlib, random, sys
from pathlib import Path
from deep_ep import jit
from tests.unit.jit_kit import FakeToolchain, build_text
draw = random.Random(sys.argv[2])
for _ in range(100):
    text = f"text {draw.randrange(3)}"
    built = build_text(FakeToolchain(), jit.Store(Path(sys.argv[1])), text)
    assert built.code == text.encode()
    if draw.random() < 0.2:
        with contextlib.suppress(OSError):
            (built.folder / "artifact.txt").write_text("te")
"""


def test_processes_that_damage_and_build_at_once_get_the_right_code(store: jit.Store) -> None:
    children = [start_python(BUILD_AND_DAMAGE, str(store.root), str(seed)) for seed in range(3)]
    outputs = [child.communicate(timeout=120) for child in children]
    assert outputs == [("", "")] * 3
    assert [child.returncode for child in children] == [0, 0, 0]
    assert files_of(store) == {"kernels"}


# Disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small disk of this test's own; remount("remount,ro") changes it."""
    place = tmp_path / "disk"
    place.mkdir(mode=0o700)

    def mount(options: str) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if os.geteuid() != 0 or subprocess.run(words, capture_output=True).returncode != 0:
            pytest.skip("this process may not mount a disk")
        return place

    yield mount
    while os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


def check_private_build(toolchain: FakeToolchain, store: jit.Store, caplog: pytest.LogCaptureFixture, why: str) -> None:
    """The build works, is kept for this process, and one warning says why it is not in the store."""
    first, second = build_text(toolchain, store), build_text(toolchain, store)
    assert (first.hit, second.hit) == (False, True)
    assert first.code == second.code == first.artifact.read_bytes() == b"some text"
    assert not first.folder.is_relative_to(store.root)
    build_text(toolchain, store, "another text")
    (warning,) = warnings_of(caplog)
    assert str(store.root) in warning
    assert why in warning


def test_a_read_only_folder_is_warned_of(
    store: jit.Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make = Path.mkdir

    def refuse(path: Path, *args: int, **options: int) -> None:
        if path.is_relative_to(store.root):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        make(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", refuse)
    check_private_build(FAKE, store, caplog, "Read-only file system")


def test_a_read_only_disk_still_gives_what_is_on_it(
    disk: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    store = jit.Store(disk("size=1m,mode=0700"))
    built = build_text(FAKE, store, "built before")
    disk("remount,ro")
    again = build_text(FAKE, store, "built before")
    assert again.hit
    assert again.folder == built.folder
    assert not warnings_of(caplog)
    check_private_build(FAKE, store, caplog, "Read-only file system")


def test_a_full_folder_is_warned_of(store: jit.Store, caplog: pytest.LogCaptureFixture) -> None:
    def fill(folder: Path) -> None:
        if folder.is_relative_to(store.root):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "artifact.txt"))

    check_private_build(FakeToolchain(meanwhile=fill), store, caplog, "No space left on device")


@pytest.mark.parametrize("room", [4, 24])  # kiB: too little for the source; for what the compiler writes
def test_a_compiler_on_a_full_disk(
    disk: Callable[[str], Path], room: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = jit.Store(disk(f"size={room}k,mode=0700"))
    built = jit.build(TINY_KERNEL, jit.Gxx(more_include_dirs=write_headers(tmp_path)), store=store)
    assert run_tiny(built) == [1, 7, 13, 19]
    assert not built.folder.is_relative_to(store.root)
    (warning,) = warnings_of(caplog)
    assert "No space left on device" in warning
    assert not list(store.root.glob("*/*")), "nothing half-done stays"


def test_no_folder_anywhere_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(EPEnvironmentError, match="set EP_JIT_CACHE_DIR or TMPDIR"):
        build_text(FAKE, jit.Store(tmp_path / "cache"))
    monkeypatch.undo()


# Other users


def planted(store: jit.Store) -> Path:
    """An entry whose artifact is not what the source gives, as a thief would leave it: with a fitting manifest."""
    built = build_text(FAKE, store)
    other = build_text(FAKE, store, "planted")
    (built.folder / "artifact.txt").write_bytes(other.code)
    manifest = json.loads((built.folder / "manifest.json").read_text())
    manifest["files"]["artifact.txt"] = json.loads((other.folder / "manifest.json").read_text())["files"][
        "artifact.txt"
    ]
    (built.folder / "manifest.json").write_text(json.dumps(manifest))
    assert build_text(FAKE, store).code == b"planted", "the attack works where nothing forbids it"
    return built.folder


@pytest.mark.parametrize("place", [".", "kernels"])
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_may_write_is_never_used(
    store: jit.Store, place: str, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    planted(store)
    (store.root / place).chmod(mode)
    before = sorted(store.root.rglob("*"))
    check_private_build(
        FAKE, store, caplog, f"may be written by other users (mode {mode:04o}), who may have filled it; remove it"
    )
    assert sorted(store.root.rglob("*")) == before


@needs_root
@pytest.mark.parametrize("place", [".", "kernels"])
def test_a_folder_of_another_user_is_never_used(store: jit.Store, place: str, caplog: pytest.LogCaptureFixture) -> None:
    planted(store)
    os.chown(store.root / place, 12345, -1)
    check_private_build(FAKE, store, caplog, "is owned by user 12345 and not by user 0")


def check_distrusted_entry(store: jit.Store, caplog: pytest.LogCaptureFixture, why: str) -> None:
    built = build_text(FAKE, store)
    assert built.code == built.artifact.read_bytes() == b"some text"
    assert not built.folder.is_relative_to(store.root)
    (warning,) = warnings_of(caplog)
    assert "does not load" in warning
    assert why in warning


@pytest.mark.parametrize("name", [".", "artifact.txt", "manifest.json"])
def test_an_entry_that_others_may_write_is_never_loaded(
    store: jit.Store, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (planted(store) / name).chmod(0o777)
    check_distrusted_entry(store, caplog, "may be written by other users (mode 0777)")


@needs_root
@pytest.mark.parametrize("name", [".", "artifact.txt", "manifest.json"])
def test_an_entry_of_another_user_is_never_loaded(
    store: jit.Store, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    os.chown(planted(store) / name, 12345, -1)
    check_distrusted_entry(store, caplog, "is owned by user 12345 and not by user 0")


def test_a_link_to_another_folder_is_not_followed(store: jit.Store, tmp_path: Path) -> None:
    folder = planted(store)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert build_text(FAKE, store).code == b"some text"


def test_another_toolchain_has_another_entry(store: jit.Store) -> None:
    build_text(FAKE, store)
    assert not build_text(replace(FAKE, version="2"), store).hit
