"""The disk cache under what can happen to a file: races, truncation, flipped bits, no space, no permission."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from einscade.runtime import cache as cache_module
from einscade.runtime.cache import DiskCache, default_directory, key

ENTRY = {"source": "def run(x):\n    return (x,)\n", "tiles": [["M0", 128]], "measured": 0.25, "name": "naïve"}


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    cache_module._warn_once.cache_clear()
    return DiskCache(tmp_path / "cache")


def test_an_entry_comes_back_equal(cache: DiskCache) -> None:
    address = key({"program": "p"})
    assert cache.get(address) is None
    assert cache.put(address, ENTRY)
    assert cache.get(address) == ENTRY


def test_the_address_depends_on_every_part() -> None:
    parts = {"program": "p", "recipe": "exact", "device": "cpu", "torch": "2.13"}
    addresses = {key(parts)} | {key({**parts, name: "other"}) for name in parts}
    assert len(addresses) == len(parts) + 1
    assert key(parts) == key(dict(reversed(parts.items())))


def test_the_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EINSCADE_CACHE_DIR", str(tmp_path / "here"))
    assert default_directory() == tmp_path / "here"
    assert DiskCache().directory == tmp_path / "here"
    monkeypatch.delenv("EINSCADE_CACHE_DIR")
    assert default_directory().name == "einscade"


def test_every_truncation_is_refused_and_can_be_rebuilt(cache: DiskCache) -> None:
    address = key({"program": "p"})
    cache.put(address, ENTRY)
    whole = cache.path(address).read_bytes()
    for length in range(len(whole)):
        cache.path(address).write_bytes(whole[:length])
        assert cache.get(address) is None
        assert not cache.path(address).exists()
    cache.put(address, ENTRY)
    assert cache.get(address) == ENTRY


def test_every_flipped_bit_is_refused(cache: DiskCache) -> None:
    address = key({"program": "p"})
    cache.put(address, ENTRY)
    whole = cache.path(address).read_bytes()
    for position in range(len(whole)):
        broken = bytearray(whole)
        broken[position] ^= 1 << (position % 8)
        cache.path(address).write_bytes(bytes(broken))
        assert cache.get(address) is None, position


def test_foreign_files_and_moved_entries_are_refused(cache: DiskCache) -> None:
    one, other = key({"program": "one"}), key({"program": "other"})
    cache.put(one, ENTRY)
    cache.path(other).parent.mkdir(parents=True, exist_ok=True)
    os.replace(cache.path(one), cache.path(other))
    assert cache.get(other) is None
    whole = [f"einscade-cache-1 {hashlib.sha256(body).hexdigest()}\n".encode() + body for body in (b"[1]", b"{}", b"3")]
    for foreign in (b"", b"\n", b"\x80\x04]\x94.", b'{"entry": {}}', b"einscade-cache-1 0\n{}", *whole):
        cache.path(one).parent.mkdir(parents=True, exist_ok=True)
        cache.path(one).write_bytes(foreign)
        assert cache.get(one) is None


def test_a_full_disk_warns_once_and_leaves_nothing_behind(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module.os, "fsync", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert not cache.put(key({"program": "p"}), ENTRY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cache.put(key({"program": "p"}), ENTRY)
    assert [p for p in cache.directory.rglob("*") if p.is_file()] == []


def test_a_place_that_is_no_directory_warns(tmp_path: Path) -> None:
    cache_module._warn_once.cache_clear()
    (tmp_path / "file").write_text("occupied")
    cache = DiskCache(tmp_path / "file")
    with pytest.warns(RuntimeWarning, match="cannot write the cache"):
        assert not cache.put(key({"program": "p"}), ENTRY)
    with pytest.warns(RuntimeWarning, match="cannot read the cache"):
        assert cache.get(key({"program": "p"})) is None


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_directory_still_reads(cache: DiskCache) -> None:
    address = key({"program": "p"})
    cache.put(address, ENTRY)
    cache.directory.chmod(0o500)
    try:
        assert cache.get(address) == ENTRY
        with pytest.warns(RuntimeWarning, match="cannot write the cache"):
            assert not cache.put(key({"program": "elsewhere"}), ENTRY)
    finally:
        cache.directory.chmod(0o700)


def test_a_home_that_nobody_has_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user of a container who is in no list of users."""
    cache_module._warn_once.cache_clear()
    monkeypatch.setenv("EINSCADE_CACHE_DIR", "~nobody-of-this-name/cache")
    with pytest.warns(RuntimeWarning, match="no home folder is known for ~nobody-of-this-name/cache; results"):
        assert not DiskCache().put(key({"program": "p"}), ENTRY)
    with pytest.warns(RuntimeWarning, match=r"compiling again \(EINSCADE_CACHE_DIR says where it is\)"):
        assert DiskCache().get(key({"program": "p"})) is None


def test_a_directory_that_is_deleted_is_made_again(cache: DiskCache) -> None:
    address = key({"program": "p"})
    cache.put(address, ENTRY)
    shutil.rmtree(cache.directory)
    assert cache.get(address) is None
    assert cache.put(address, ENTRY)
    assert cache.get(address) == ENTRY


def _write(directory: Path, me: str, start: Any) -> None:
    cache, address = DiskCache(directory), "ab" * 32
    start.wait()
    for i in range(150):
        assert cache.put(address, {"source": me * (2000 + 37 * i), "by": me, "size": 2000 + 37 * i})
        seen = cache.get(address)
        assert seen is not None
        assert seen["source"] == seen["by"] * seen["size"]


def test_processes_that_race_see_whole_entries_only(cache: DiskCache) -> None:
    processes = multiprocessing.get_context("fork")  # they import nothing
    start = processes.Barrier(4)
    writers = [processes.Process(target=_write, args=(cache.directory, name, start), daemon=True) for name in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0, 0]
    entry = cache.get("ab" * 32)
    assert entry is not None
    assert entry["size"] == 2000 + 37 * 149
    assert [p.name for p in cache.directory.rglob("*") if p.is_file()] == [cache.path("ab" * 32).name]
