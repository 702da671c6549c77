"""Downloads that count only when they are complete."""

import hashlib
import http.client
import logging
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from dataloaders.base import DataError

_log = logging.getLogger(__name__)


class Checksum(NamedTuple):
    """A file's checksum: the algorithm as hashlib calls it, and its hexadecimal digest."""

    algorithm: str
    digest: str

    def matches(self, path: Path) -> bool:
        """Whether ``path`` is a file with this checksum."""
        if not path.is_file():
            return False
        return hashlib.new(self.algorithm, path.read_bytes(), usedforsecurity=False).hexdigest() == self.digest


def mirrored(url: str, data_url: str | None) -> str:
    """``url``, or the file of that name at the mirror ``data_url``, a folder's address or the file's own."""
    name = url.rpartition("/")[2]
    if data_url is None or data_url.endswith(f"/{name}"):
        return data_url or url
    return f"{data_url.rstrip('/')}/{name}"


def fetch(url: str, target: Path, checksum: Checksum, *, progress: bool = True) -> None:
    """Download a file unless it exists. ``target`` changes only when it is complete and its checksum is right.

    Raises DataError if it cannot be downloaded; a file that was there before is unchanged.
    """
    from torch.hub import download_url_to_file  # here, so that a configuration is checked without torch

    if checksum.matches(target):
        return
    _log.info("downloading %s", url)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            part = Path(folder) / target.name
            download_url_to_file(url, str(part), progress=progress)
            if not checksum.matches(part):
                raise ValueError(f"the {checksum.algorithm.upper()} of what came is not {checksum.digest}")
            os.replace(part, target)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"cannot download {url} ({reason}): put the file at {target} yourself, or name a mirror with --data_url"
        ) from error
