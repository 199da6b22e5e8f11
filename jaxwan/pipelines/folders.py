"""A folder that appears whole or not at all, and the checksums by which it is known later."""

import fcntl
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jaxwan.convert.save import File, OnBytes
from jaxwan.convert.verify import SUMS
from jaxwan.pipelines.ending import leaving_nothing_half

_MARGIN = 2**24  # bytes beside those of tensors: headers, and what a file system needs for names
_SYNCING = 32  # files at once: a disk makes all that wait for it durable together
_under_way: set[Path] = set()
_naming = threading.Lock()  # held while something gets a name; where the process ends, nothing gets one any more


@dataclass(frozen=True)
class Partial:
    """A folder that is being written, beside the one that it becomes."""

    path: Path

    def write(self, files: Iterable[File], progress: OnBytes | None) -> None:
        """Write files, and the sha256 of each, as `sha256sum -c` reads them."""
        sums = {file.name: file.write_to(self.path, progress or (lambda done: None), _naming) for file in files}
        text = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()
        File(SUMS, len(text), lambda sink: sink.write(text) and None).write_to(self.path, naming=_naming)


def check_target(target: Path, sources: Iterable[Path], overwrite: bool) -> None:
    """Raises OSError unless a folder can be written there: nothing is there, or what was written so before and is to be
    replaced; and it is none of the sources, in one, or around one."""
    own = target.resolve()
    for source in (source.resolve() for source in sources):
        if own == source or own in source.parents or source in own.parents:
            raise OSError(f"{target} and {source}, which is read, are in each other: choose another folder")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} in")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise FileExistsError(f"{target} exists and is no folder: choose another name")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists: choose another name, or say --overwrite")
    if not (target / SUMS).is_file():
        raise FileExistsError(f"{target} was not written here (it has no {SUMS}), and is not overwritten: remove it")


@contextmanager
def appearing(target: Path, num_bytes: int, overwrite: bool) -> Iterator[Partial]:
    """A folder to write into, which becomes `target` when all is written; after an error, or where the process is
    ended, there is no such folder. What an earlier process left that was killed outright is removed.

    Raises OSError where the disk has no room for so many bytes, or another process is writing there.
    """
    partial = target.with_name(f".{target.name}.partial")
    with _locked(partial):
        _under_way.add(partial)
        try:
            free = shutil.disk_usage(partial).free
            if free < num_bytes + _MARGIN:
                need = f"{(num_bytes + _MARGIN) / 1e9:,.1f} GB"
                raise OSError(f"{target} takes {need}, and there are {free / 1e9:,.1f} GB left on its disk")
            yield Partial(partial)
            _sync(partial)  # all of it is on the disk before it has a name
            with _naming:
                _exchange(partial, target, overwrite)
        finally:
            _under_way.discard(partial)
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """An empty folder that no other process writes into. Raises OSError."""
    try:
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise OSError(f"{partial.parent} cannot be written into ({error}): choose another folder") from error
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(f"another process is writing {partial}") from error
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
    finally:
        os.close(descriptor)


def _exchange(partial: Path, target: Path, overwrite: bool) -> None:
    old = target.with_name(f".{target.name}.old")
    if overwrite and target.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        target.replace(old)
    partial.rename(target)  # onto nothing, or an empty folder
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    with ThreadPoolExecutor(_SYNCING) as threads:
        list(threads.map(_sync_one, folder.rglob("*")))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_under_way() -> None:
    _naming.acquire()  # for good: the process ends
    for partial in list(_under_way):
        shutil.rmtree(partial, ignore_errors=True)


leaving_nothing_half.append(_remove_under_way)
