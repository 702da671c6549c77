"""Downloads that count only when they are complete, and archives that cannot write where they should not."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import logging
import os
import posixpath
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from dataloaders.base import DataError

_log = logging.getLogger(__name__)

TRIES = 5
TIMEOUT = 20.0  # seconds without a single byte
_BLOCK = 1 << 18
# A server that says one of these may say something else the next time.
_PASSING = {408, 416, 425, 429, 500, 502, 503, 504}
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


class Checksum(NamedTuple):
    """A file's checksum: the algorithm as hashlib calls it, and its hexadecimal digest."""

    algorithm: str
    digest: str

    def of(self, file: BinaryIO) -> str:
        """The digest of an open file, from its start."""
        digest = hashlib.new(self.algorithm, usedforsecurity=False)
        file.seek(0)
        while block := file.read(_BLOCK):
            digest.update(block)
        return digest.hexdigest()

    def matches(self, path: Path) -> bool:
        """Whether ``path`` is a file with this checksum."""
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return self.of(file) == self.digest


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written below ``folder``, which may not exist yet; None when something can."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return f"{existing} is not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"no permission to write in {existing}"
    return None


def mirrored(url: str, data_url: str | None) -> str:
    """The address to fetch ``url`` from: itself, or the file of that name at the mirror ``data_url``.

    ``data_url`` is a folder, or the file itself when it ends with its name.
    """
    if data_url is None:
        return url
    name = posixpath.basename(url)
    return data_url if data_url.endswith("/" + name) else f"{data_url.rstrip('/')}/{name}"


def fetch(
    url: str,
    target: Path,
    checksum: Checksum,
    *,
    progress: bool = True,
    tries: int = TRIES,
    timeout: float = TIMEOUT,
) -> None:
    """Download a file. ``target`` appears only when all of it is on the disk and its checksum is right.

    The bytes go to a hidden file beside it. A broken connection is resumed where it broke; of several
    processes that want the same file one downloads and the others wait.

    Args:
        tries: how often to connect.
        timeout: seconds without a byte after which a connection counts as broken.

    Raises:
        DataError: it cannot be had; nothing is left behind, and a file that was there is as it was.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f".{target.name}.part")) as (part, file):
            if checksum.matches(target):  # another process was faster
                return
            _log.info("downloading %s", url)
            _receive_checked(url, file, checksum, target.name, progress, tries, timeout)
            os.fsync(file.fileno())
            os.replace(part, target)
            _sync_folder(target.parent)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}") from error


def _receive_checked(
    url: str, file: BinaryIO, checksum: Checksum, name: str, progress: bool, tries: int, timeout: float
) -> None:
    """Fill ``file`` from ``url``, connecting up to ``tries`` times, until its checksum is right."""
    problem = ""
    for attempt in range(tries):
        if attempt:
            _log.info("%s: %s; trying again", url, problem)
            time.sleep(min(0.5 * 2.0 ** (attempt - 1), 8.0))
        try:
            _receive(url, file, name, progress, timeout)
        except urllib.error.HTTPError as error:
            problem = f"the server answers {error.code} {error.reason}"
            if error.code not in _PASSING:
                break
            if error.code == 416:  # what we have is longer than the file there
                file.truncate(0)
            continue
        except (OSError, http.client.HTTPException, ValueError) as error:
            if getattr(error, "errno", None) in _DISK:
                raise
            problem = str(getattr(error, "reason", error)) or type(error).__name__
            continue
        found = checksum.of(file)
        if found == checksum.digest:
            return
        problem = f"its {checksum.algorithm.upper()} is {found} instead of {checksum.digest}"
        file.truncate(0)
    raise DataError(
        f"cannot download {url}: {problem}; put the file into dataroot yourself, or name a --data_url"
    )


def _receive(url: str, file: BinaryIO, name: str, progress: bool, timeout: float) -> None:
    """Append to ``file`` what it lacks of ``url``.

    Raises:
        OSError, http.client.HTTPException: the connection broke, or the file cannot be written.
    """
    have = file.seek(0, os.SEEK_END)
    headers = {"User-Agent": "Mozilla/5.0 (compatible; python-urllib)"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as answer:
        resumed = have > 0 and answer.status == 206
        if resumed and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            file.truncate(0)
            raise OSError("the server resumes at another place than asked")
        if not resumed:
            have = 0
            file.seek(0)
            file.truncate()
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        with tqdm(
            total=total, initial=have, unit="B", unit_scale=True, desc=name, disable=not progress, leave=False
        ) as bar:
            while block := answer.read(_BLOCK):
                file.write(block)
                bar.update(len(block))
        file.flush()
        if total is not None and file.tell() < total:
            raise OSError(f"the connection ended after {file.tell()} of {total} bytes")


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """The unfinished file, open and locked; removed in the end unless it has been renamed."""
    while True:
        file = open(part, "a+b")
        try:
            _lock(file)
            # Whoever held the lock before us may have renamed or removed the file that we opened.
            current = os.path.exists(part) and os.path.samestat(os.fstat(file.fileno()), os.stat(part))
        except BaseException:
            file.close()
            raise
        if current:
            break
        file.close()
    try:
        yield part, file
    finally:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                os.unlink(part)
        file.close()


def _lock(file: BinaryIO) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows, where two processes would have to start at the same time to clash
        return
    fcntl.flock(file, fcntl.LOCK_EX)


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` last through a power failure, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def extract(archive: Path, root: Path, members: Collection[str]) -> None:
    """Write the named files of a tar archive below ``root``, each complete or not at all.

    Whatever else the archive holds is not looked at, so that no name in it can lead out of ``root``.

    Args:
        members: their full names in the archive, with forward slashes.

    Raises:
        DataError: the archive is damaged, a member is missing, or is a link or device instead of a file.
    """
    missing = set(members)
    try:
        with tarfile.open(archive) as tar:
            for info in tar:
                name = posixpath.normpath(info.name)
                if name not in missing:
                    continue
                if not info.isreg():
                    raise DataError(f"{archive}: {info.name} is not a plain file in it")
                content = tar.extractfile(info)
                assert content is not None  # a regular member has content
                write_whole(root / name, content)
                missing.discard(name)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"cannot unpack {archive} into {root}: {error}") from error
    if missing:
        raise DataError(f"{archive}: {', '.join(sorted(missing))} missing in it")


def write_whole(path: Path, content: BinaryIO) -> None:
    """Write a file beside its place, then rename it there, so that it is whole or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            shutil.copyfileobj(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
