"""Savers and removals in object stores that meet, and answers of the store that are lost: who gets a number, and what decides."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import subprocess
import sys
import threading

import msgspec
import pytest
from obstore.store import MemoryStore

from gms_core.errors import GmsError, SnapshotBusy, TransferFailed
from gms_core.snapshot.manifest import BLOCK_BYTES
from gms_core.snapshot.objects.bucket import Bucket
from gms_core.snapshot.objects.pruning import store_clock
from gms_core.snapshot.objects.records import CLAIM
from gms_core.snapshot.objects.root import open_root
from gms_core.snapshot.objects.staging import ObjectStaging
from gms_core.snapshot.on_disk import COMMITTED, FAILED, MANIFEST
from gms_core.snapshot.shelves import Objects, open_shelf
from tests.unit.object_stores import Harm, forget_frames, holds, objects_in, put_image, save_objects


@pytest.fixture(params=["memory", "file"])
def bucket(request, tmp_path):
    return Bucket("s3://in-memory/prefix", MemoryStore()) if request.param == "memory" else Bucket(f"file://{tmp_path}/objects")


@pytest.fixture
def shelf(bucket):
    return objects_in(bucket)


def begin(shelf, name="model"):
    return ObjectStaging.begin(shelf.root, name, stripe_bytes=BLOCK_BYTES, shard_bytes=BLOCK_BYTES)


def states(shelf, name=""):
    return [(one.name, one.version, one.state) for one in shelf.entries(name)]


@pytest.mark.parametrize("store", ["memory", "file", "s3"])
def test_each_saver_has_a_number_of_its_own_when_several_save_at_once(store, tmp_path, s3):
    bucket = {"memory": lambda: Bucket("s3://m", MemoryStore()), "file": lambda: Bucket(f"file://{tmp_path}"), "s3": lambda: Bucket(s3.url)}[store]()
    shelf = objects_in(bucket)
    barrier, numbers, errors = threading.Barrier(6), [], []

    def save(number):
        barrier.wait()
        try:
            numbers.append((save_objects(shelf, first=bytes([number])).version, bytes([number])))
        except GmsError as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len({version for version, _ in numbers}) == 6
    assert [holds(shelf, f"model@{version}") for version, _ in sorted(numbers)] == [first for _, first in sorted(numbers)]


def test_roots_of_two_who_make_it_at_once_are_one(bucket):
    barrier, ids = threading.Barrier(4), []

    def make():
        barrier.wait()
        ids.append(objects_in(bucket).root.id)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 1
    assert len(ids) == 4


@pytest.mark.parametrize("key", ["gms-root", CLAIM, MANIFEST, COMMITTED])
def test_save_goes_on_when_the_answer_to_what_it_makes_once_is_lost(s3, key):
    s3.harm.append(Harm("PUT", f"{key}$", lose_answer=True))
    shelf = open_shelf([s3.url], create=True)
    assert save_objects(shelf, first=b"1").version == 1
    assert not [one for one in s3.harm if one.times], "it was done"
    assert sum(request.key.endswith(key) and request.method == "PUT" for request in s3.seen) >= 2, "it was sent again, and met its own object"
    assert holds(shelf) == b"1"


def test_snapshot_stays_when_it_is_committed_while_it_is_given_up(shelf, monkeypatch):
    save_objects(shelf, first=b"1")
    staging = begin(shelf)
    image = put_image(shelf.root.bucket, staging.target)
    create = Bucket.create

    def committed_meanwhile(bucket, key, data):
        monkeypatch.setattr(Bucket, "create", create)
        staging.commit([image])
        return create(bucket, key, data)

    monkeypatch.setattr(Bucket, "create", committed_meanwhile)
    with pytest.raises(SnapshotBusy, match="model@2 was committed just now"):
        shelf.prune("model", version=2)
    staging.close()
    assert holds(shelf, "model@2") == b"x"


def test_one_of_them_decides_when_a_commit_and_a_removal_race(bucket):
    shelf = objects_in(bucket)
    outcomes = set()
    for _ in range(20):
        staging = begin(shelf)
        image, number = put_image(bucket, staging.target), staging.reference.version
        barrier, told = threading.Barrier(2), []

        def remove(number=number, barrier=barrier, told=told):
            barrier.wait()
            try:
                shelf.prune("model", version=number)
                told.append("removed")
            except SnapshotBusy:
                told.append("refused")

        thread = threading.Thread(target=remove)
        thread.start()
        barrier.wait()
        try:
            with staging:
                staging.commit([image])
            committed = True
        except SnapshotBusy:
            committed = False
        thread.join()
        there = [state for _, version, state in states(shelf) if version == number]
        if committed and told == ["refused"]:
            assert holds(shelf, f"model@{number}") == b"x"
        else:
            assert "committed" not in there
        outcomes.add((committed, *told))
    assert (False, "refused") not in outcomes


def test_there_is_a_snapshot_when_the_commit_was_made_and_yet_failed(s3, monkeypatch):
    monkeypatch.setattr("gms_core.snapshot.objects.bucket.RETRIES", 1)
    shelf = open_shelf([s3.url], create=True)
    save_objects(shelf, first=b"1")
    seen = []

    def prune_elsewhere():  # by somebody who sees it, and counts on it
        seen.append(Objects(open_root(Bucket(s3.url))).prune("model", keep=1).removed)

    s3.harm += [
        Harm("PUT", f"2/{COMMITTED}$", lose_answer=True),
        Harm("PUT", f"2/{COMMITTED}$", status=500, word="InternalError", call=prune_elsewhere),
    ]
    assert save_objects(shelf, first=b"2").version == 2
    assert seen == [(1,)]
    assert states(shelf) == [("model", 2, "committed")]
    assert holds(shelf) == b"2"


def test_there_is_no_snapshot_when_the_commit_was_not_made(s3, monkeypatch):
    monkeypatch.setattr("gms_core.snapshot.objects.bucket.RETRIES", 1)
    shelf = open_shelf([s3.url], create=True)
    save_objects(shelf, first=b"1")
    s3.harm.append(Harm("PUT", f"2/{COMMITTED}$", times=2, status=500, word="InternalError"))
    with pytest.raises(TransferFailed, match=r"2/COMMITTED cannot be made: the store refuses \(500 InternalError\)") as raised:
        save_objects(shelf, first=b"2")
    forget_frames(raised.value)
    assert states(shelf) == [("model", 1, "committed"), ("model", 2, "failed")]
    assert save_objects(shelf, first=b"3").version == 3
    assert states(shelf) == [("model", 1, "committed"), ("model", 3, "committed")]


def test_snapshot_is_not_taken_back_when_an_interrupt_comes_after_its_commit(shelf, monkeypatch):
    create = Bucket.create

    def interrupted(bucket, key, data):
        found = create(bucket, key, data)
        if key == f"model/1/{COMMITTED}":
            monkeypatch.setattr(Bucket, "create", create)
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Bucket, "create", interrupted)
    assert save_objects(shelf).version == 1
    assert states(shelf) == [("model", 1, "committed")]
    assert FAILED not in shelf.root.bucket.objects("model/1")


def test_user_is_told_when_nobody_knows_whether_the_commit_was_made(s3, monkeypatch):
    monkeypatch.setattr("gms_core.snapshot.objects.bucket.RETRIES", 0)
    shelf = open_shelf([s3.url], create=True)
    s3.harm.append(Harm("PUT", f"1/({COMMITTED}|{FAILED})$", times=100, lose_answer=True))
    with pytest.raises(TransferFailed, match="1/COMMITTED cannot be made") as raised:
        save_objects(shelf)
    forget_frames(raised.value)
    assert "Whether model@1 is there is not known" in raised.value.hint
    s3.harm.clear()
    assert states(shelf) == [("model", 1, "committed")]
    assert FAILED not in shelf.root.bucket.objects("model/1")


def test_object_is_made_when_the_store_was_busy_with_another_request_for_it(s3):
    shelf = open_shelf([s3.url], create=True)
    s3.harm.append(Harm("PUT", "claim.json$", status=409, word="ConditionalRequestConflict"))
    assert save_objects(shelf).version == 1


def test_number_is_not_taken_when_the_store_lets_another_one_replace_the_claim(s3):
    shelf = open_shelf([s3.url], create=True)
    s3.harm.append(Harm("GET", f"model/1/{CLAIM}$", call=lambda: Bucket(s3.url).write(f"model/1/{CLAIM}", b"of another one")))
    assert save_objects(shelf).version == 2


SAVE = """
import sys
from gms_core.snapshot.shelves import open_shelf
from tests.unit.object_stores import save_objects

sys.stdin.readline()
print(save_objects(open_shelf([sys.argv[1]]), first=sys.argv[2].encode()).version)
"""


def test_each_process_has_a_number_of_its_own_when_several_save_at_once(s3):
    shelf = open_shelf([s3.url], create=True)
    with contextlib.ExitStack() as stack:
        processes = []
        for number in range(3):
            command = [sys.executable, "-c", SAVE, s3.url, str(number)]
            process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        told = [process.communicate(timeout=100)[0] for process in processes]
    numbers = {int(one): str(index).encode() for index, one in enumerate(told)}
    assert len(numbers) == 3
    assert {version: holds(shelf, f"model@{version}") for version in numbers} == numbers


def test_process_is_told_from_another_one_when_it_has_its_number():
    from gms_core.snapshot.objects.savers import has_ended, is_alive, this_process

    this = this_process()
    assert (this.pid, is_alive(this), has_ended(this)) == (os.getpid(), True, False)
    another = msgspec.structs.replace(this, started="1")
    assert (is_alive(another), has_ended(another)) == (False, True)
    for unknown in ({"boot": "x"}, {"namespace": "x"}, {"boot": ""}, {"started": ""}):
        elsewhere = msgspec.structs.replace(this, **unknown)
        assert (is_alive(elsewhere), has_ended(elsewhere)) == (False, False)


def test_time_is_the_stores_when_a_removal_asks_for_it(bucket):
    bucket.write("model/clock", b"left by a removal that was killed")
    assert abs((store_clock(bucket, "model") - dt.datetime.now(dt.UTC)).total_seconds()) < 600
    assert bucket.objects() == {}
