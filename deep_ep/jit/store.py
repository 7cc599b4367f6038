"""A folder of finished builds, shared by all processes of one user, on any file system.

Nothing here relies on locks. A build is made in a folder of its own and then renamed, whole, to its place, so a reader
sees all of it or nothing; who comes second keeps a copy of its own. A manifest of checksums is read with every entry:
what is truncated or altered counts as absent and is built again. Nothing is read from a folder that another user owns
or could write to, because what lies here is run.

    <root>/kernels/<name>/     finished entries: source, artifact, log.txt, command.txt, manifest.json
    <root>/building/<random>/  builds under way, and what killed processes left of theirs, for an hour
    <root>/failed/<name>/      source, command and log of failures of the last week
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger("deep_ep")

MANIFEST = "manifest.json"
# A compile takes seconds, so whatever has been under way for an hour is dead.
STALE_BUILD_SECONDS = 3600.0
STALE_FAILURE_SECONDS = 7 * 24 * 3600.0
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class DistrustedError(PermissionError):
    """A folder or file that another user could have filled; the message says why."""


@dataclass(frozen=True)
class Entry:
    """A finished build: its folder, the content of every file by name, and what the builder noted about it."""

    folder: Path
    files: Mapping[str, bytes]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Store:
    """The builds below one root, which need not exist yet.

    Attributes:
        root: the folder.
        lasting: whether it outlives this process.
    """

    root: Path
    lasting: bool = True

    def find(self, name: str, key: str) -> Entry | None:
        """A finished build, or None when there is none that is whole and safe to run."""
        place = self.root / "kernels" / name
        try:
            self._require_trust()
        except OSError:
            return None  # whoever asks for a workspace next is told why
        try:
            return _read_entry(place, key)
        except FileNotFoundError:
            return None
        except DistrustedError as reason:
            warn_once(f"the JIT cache does not load {place}: {reason}")
            return None
        except (OSError, ValueError) as error:
            logger.info("the JIT cache entry %s is broken and will be built again: %s", place, error)
            return None

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """A fresh folder to build in; removed at the end unless it was published or kept by then.

        Raises:
            OSError: nothing can be written here; DistrustedError: somebody else could write here.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._require_trust()
        for folder in self._folders():
            folder.mkdir(mode=0o700, exist_ok=True)
        _sweep(self.root / "building", STALE_BUILD_SECONDS)
        _sweep(self.root / "failed", STALE_FAILURE_SECONDS)
        folder = Path(tempfile.mkdtemp(dir=self.root / "building"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, folder: Path, name: str, key: str, facts: Mapping[str, Any]) -> Entry:
        """Turn a finished workspace into an entry.

        Returns:
            the entry: in its place, or, when another process was faster, as this process's own copy.

        Raises:
            OSError: it cannot be written.
        """
        _seal(folder, key, facts)
        entry = _read_entry(folder, key)
        place = self.root / "kernels" / name
        if _rename(folder, place):
            return Entry(place, entry.files, entry.facts)
        with contextlib.suppress(FileNotFoundError):
            if _is_broken(place, key):
                with self.workspace() as rubbish:
                    _rename(place, rubbish / "broken")
        if _rename(folder, place):
            return Entry(place, entry.files, entry.facts)
        return private_store()._copy_of(entry, name, key)

    def _copy_of(self, entry: Entry, name: str, key: str) -> Entry:
        own = self.find(name, key)
        if own is None:
            shutil.copytree(entry.folder, self.root / "kernels" / name, dirs_exist_ok=True)
            own = Entry(self.root / "kernels" / name, entry.files, entry.facts)
        return own

    def keep_failed(self, folder: Path, name: str) -> Path | None:
        """Move a failed workspace to where its author can look at it; None when that cannot be done."""
        try:
            parent = self.root / "failed" if self.lasting else Path(tempfile.mkdtemp(prefix="deep_ep-failed-"))
            shutil.rmtree(parent / name, ignore_errors=True)
            return Path(shutil.move(folder, parent / name))
        except OSError:
            return None

    def _folders(self) -> list[Path]:
        return [self.root / name for name in ("kernels", "building", "failed")]

    def _require_trust(self) -> None:
        _check_trust(self.root, os.stat(self.root))  # it may be a link: the user's own variable names it
        for folder in self._folders():
            with contextlib.suppress(FileNotFoundError):
                _check_trust(folder, os.lstat(folder))


@functools.cache
def _private_store_of(process: int) -> Store:
    try:
        parent: str | None = tempfile.gettempdir()
    except FileNotFoundError:
        parent = "/dev/shm"  # memory: what is left where no disk can be written
    root = Path(tempfile.mkdtemp(prefix="deep_ep-", dir=parent))
    atexit.register(_remove_private, root, process)
    return Store(root, lasting=False)


def _remove_private(root: Path, process: int) -> None:
    if os.getpid() == process:  # a forked child inherits the exit handler, not the folder
        shutil.rmtree(root, ignore_errors=True)


def private_store() -> Store:
    """The store of this process alone, for when the shared one cannot be used; it goes when the process ends."""
    return _private_store_of(os.getpid())


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning unless this process has logged the same one already."""
    logger.warning("%s", text)


def _check_trust(path: Path, status: os.stat_result) -> None:
    user = os.geteuid()
    if status.st_uid != user:
        raise DistrustedError(f"{path} is owned by user {status.st_uid} and not by user {user}, who runs this process")
    if status.st_mode & WRITABLE_BY_OTHERS:
        mode = stat.S_IMODE(status.st_mode)
        raise DistrustedError(
            f"{path} may be written by other users (mode {mode:04o}), who may have filled it; remove it"
        )


def _read_entry(place: Path, key: str) -> Entry:
    """Read and verify all of an entry.

    Raises:
        OSError: it is not there; DistrustedError: somebody else could have written it; ValueError: it is not whole.
    """
    status = os.lstat(place)
    if not stat.S_ISDIR(status.st_mode):
        raise ValueError("it is no folder")
    _check_trust(place, status)
    manifest = json.loads(_read_trusted(place / MANIFEST))
    try:
        found, digests, facts = manifest["key"], dict(manifest["files"]), dict(manifest["facts"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} is malformed") from error
    if found != key:
        raise ValueError(f"{MANIFEST} is of another build")
    files = {name: _read_trusted(place / name) for name in digests}
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != digests[name]:
            raise ValueError(f"{name} is not what its checksum says")
    return Entry(place, files, facts)


def _read_trusted(path: Path) -> bytes:
    # The open file is checked, not its name: nobody can put another file there in between.
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        _check_trust(path, os.fstat(file.fileno()))
        return file.read()


def _is_broken(place: Path, key: str) -> bool:
    try:
        _read_entry(place, key)
    except DistrustedError:
        return False  # not ours to replace
    except (OSError, ValueError):
        return True
    return False


def _seal(folder: Path, key: str, facts: Mapping[str, Any]) -> None:
    """Write the manifest, and take away what a generous umask granted to others."""
    digests = {}
    for path in sorted(folder.iterdir()):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~WRITABLE_BY_OTHERS)
        digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"key": key, "facts": dict(facts), "files": digests}, indent=2) + "\n")
    manifest.chmod(0o600)


def _rename(source: Path, target: Path) -> bool:
    """Whether a folder could be moved; not when something is at the target, which rename cannot replace."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return False
        raise
    return True


def _sweep(parent: Path, seconds: float) -> None:
    """Remove the folders that are older than some seconds."""
    for folder in parent.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > seconds:
                shutil.rmtree(folder, ignore_errors=True)
