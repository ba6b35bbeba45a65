"""Of many that want a job or a folder one has it, until it lets go or is dead."""

import json
import os
import socket
import threading
import time

import pytest

from cityrag_jax import leases as leasing
from cityrag_jax.leases import LOCK, FolderLock, Leases


def test_a_lease_is_one_holders_until_it_is_released(tmp_path):
    ours, theirs = Leases(tmp_path), Leases(tmp_path)
    assert ours.take("a") and not ours.take("a") and ours.holds("a")
    with pytest.MonkeyPatch.context() as patch:  # as another living process sees it
        patch.setattr(leasing, "is_running", lambda pid: True)
        assert not theirs.take("a") and theirs.take("b")
        assert set(theirs.holders()) == {"a", "b"}
        ours.release("a", settled=False)
        assert set(theirs.holders()) == {"b"}
        assert theirs.take("a") and theirs.number("a") == 1
    theirs.release("a", settled=True)
    theirs.close()
    assert [f.name for f in tmp_path.iterdir()] == ["b.000000"]


def test_the_lease_of_the_dead_is_taken_over_once(tmp_path, monkeypatch):
    """At once where the process is known to be dead, else after patience."""
    monkeypatch.setattr(leasing, "PATIENCE_S", 0.2)
    dead = {"host": "elsewhere", "pid": 1, "machine": "elsewhere"}
    (tmp_path / "a.000004").write_text(json.dumps(dead))
    ours, theirs = Leases(tmp_path), Leases(tmp_path)
    assert not ours.take("a") and not theirs.take("a")  # it might live
    os.utime(tmp_path / "a.000004", (1, 1))  # and does
    time.sleep(0.25)
    assert not ours.take("a")
    time.sleep(0.25)
    assert ours.take("a") and ours.number("a") == 5
    monkeypatch.setattr(leasing, "is_running", lambda pid: True)
    assert not theirs.take("a")
    here = {"host": socket.gethostname(), "pid": 2**22 + 1}
    here["machine"] = leasing.machine()
    (tmp_path / "b.000000").write_text(json.dumps(here))
    monkeypatch.undo()
    assert ours.take("b")


def test_a_holder_that_was_suspended_learns_that_it_lost(tmp_path):
    ours = Leases(tmp_path)
    assert ours.take("a")
    (tmp_path / "a.000001").write_text("{}")
    assert not ours.holds("a")
    ours.release("a", settled=False)
    assert (tmp_path / "a.000001").read_text() == "{}"


def test_one_of_two_that_watch_a_stale_lock_takes_it_and_the_other_is_refused(
    tmp_path, monkeypatch
):
    """Both find it untouched at the same time; files that are replaced would let in
    both."""
    monkeypatch.setattr(leasing, "PATIENCE_S", 0.3)
    monkeypatch.setattr(leasing, "BEAT_S", 0.1)
    monkeypatch.setattr(leasing, "is_running", lambda pid: True)
    stale = tmp_path / LOCK / f"{LOCK}.000000"
    stale.parent.mkdir()
    stale.write_text(json.dumps({"host": "elsewhere", "pid": 7, "machine": "else"}))
    locks, ended = [FolderLock(tmp_path), FolderLock(tmp_path)], []

    def take(lock):
        try:
            lock.take()
            ended.append("taken")
        except ValueError as error:
            ended.append(str(error))

    threads = [threading.Thread(target=take, args=[lock]) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused, taken = sorted(ended, key="taken".__eq__)
    assert taken == "taken"
    assert f"{tmp_path} is in use by process {os.getpid()} on" in refused
    for lock in locks:
        lock.release()
    assert not any(tmp_path.iterdir())


def test_a_folder_made_for_a_lock_alone_goes_with_it(tmp_path):
    lock = FolderLock(tmp_path / "new")
    lock.take()
    assert (tmp_path / "new" / LOCK).exists()
    lock.release()
    lock.release()
    assert not any(tmp_path.iterdir())
