"""The disk cache: what compiling made, kept under the hash of everything it was made from.

Comes in: a mapping of plain values that says what an entry depends on (`key`), and an entry of plain values (JSON).
Goes out: the entry, or None where there is none that can be trusted.

* Content-addressed: the file's name is the SHA-256 of the key's parts; another version of anything is another file.
* Atomic: an entry is written to a temporary file of its own, synced, and renamed, so that readers see all or nothing.
* Checked: the first line holds the SHA-256 of the rest. Truncated, flipped or foreign files are removed and rebuilt.
* Data only: JSON and source text. Nothing is unpickled.

A directory that cannot be read or written costs a warning, never a failure.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["DiskCache", "default_directory", "key", "source_fingerprint"]

_FORMAT = "einscade-cache-1"


def default_directory() -> Path:
    """`EINSCADE_CACHE_DIR`, or `einscade` in the user's cache folder of this platform. Raises OSError where that is in
    the home of a user who has none."""
    chosen = os.environ.get("EINSCADE_CACHE_DIR")
    if not chosen and sys.platform == "darwin":
        chosen = "~/Library/Caches/einscade"
    elif not chosen and sys.platform == "win32":
        chosen = f"{os.environ.get('LOCALAPPDATA') or '~/AppData/Local'}/einscade"
    elif not chosen:
        chosen = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/einscade"
    try:
        return Path(chosen).expanduser()
    except RuntimeError:
        raise OSError(f"no home folder is known for {chosen}") from None


def key(parts: Mapping[str, Any]) -> str:
    """The content address of an entry that depends on `parts` (JSON values) and on this package's own source."""
    text = json.dumps({**parts, "einscade": source_fingerprint()}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def source_fingerprint() -> str:
    """A hash over the sources of the layers that decide what an entry holds: `ir`, `passes`, `codegen`, `runtime`.

    A version number alone would serve stale kernels to whoever edits a checkout.
    """
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for layer in ("ir", "passes", "codegen", "runtime"):
        for path in sorted((root / layer).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


class DiskCache:
    """Entries in `directory`, one file each; `None` means `default_directory()` at the time of each access."""

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self._directory = None if directory is None else Path(directory)

    @property
    def directory(self) -> Path:
        return self._directory if self._directory is not None else default_directory()

    def path(self, address: str) -> Path:
        return self.directory / address[:2] / f"{address}.json"

    def get(self, address: str) -> dict[str, Any] | None:
        """The entry at `address`; None when there is none, or when what is there was not written by `put`."""
        try:
            path = self.path(address)
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn("read", error, "compiling again")
            return None
        entry = _decode(raw, address)
        if entry is None:
            with contextlib.suppress(OSError):
                path.unlink()
        return entry

    def put(self, address: str, entry: Mapping[str, Any]) -> bool:
        """Stores `entry` (JSON values); whether that worked. The last of several writers wins, whole."""
        temporary: str | None = None
        try:
            path = self.path(address)
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
            with os.fdopen(descriptor, "wb") as file:
                file.write(_encode(address, entry))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            return True
        except OSError as error:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            self._warn("write", error, "results are not kept")
            return False

    def _warn(self, what: str, error: OSError, then: str) -> None:
        where = f" {self.directory}" if error.strerror else ""  # without: it is the directory that is not known
        reason = error.strerror or error
        _warn_once(f"cannot {what} the cache{where}: {reason}; {then} (EINSCADE_CACHE_DIR says where it is)")


def _encode(address: str, entry: Mapping[str, Any]) -> bytes:
    body = json.dumps({"address": address, "entry": entry}, sort_keys=True, indent=1).encode()
    return f"{_FORMAT} {hashlib.sha256(body).hexdigest()}\n".encode() + body


def _decode(raw: bytes, address: str) -> dict[str, Any] | None:
    header, _, body = raw.partition(b"\n")
    if header != f"{_FORMAT} {hashlib.sha256(body).hexdigest()}".encode():
        return None
    record = json.loads(body)
    known = isinstance(record, dict) and record.get("address") == address
    return record["entry"] if known and isinstance(record.get("entry"), dict) else None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"einscade: {message}", RuntimeWarning, stacklevel=5)
