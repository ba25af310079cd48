"""The kernel's notice of a death: who gives it, who waits for it, and that neither costs anybody anything when it cannot be had."""

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import threading

import pytest

from gms_core import death_notice
from gms_core.errors import ProtocolError

WAITERS = 0x80000000
GIVES = """
import sys
from gms_core import death_notice
death_notice.give_at_death(int(sys.argv[1]))
print(flush=True)
sys.stdin.read()
"""
JOINS = """
import sys
from pathlib import Path
from gms_core import death_notice
from gms_core.client import Membership, connect
from gms_core.errors import ProtocolError

def refused(descriptor):
    raise ProtocolError("set_robust_list failed: Operation not permitted")

death_notice.give_at_death = refused
membership = Membership.join(connect(socket_path=Path(sys.argv[1])), "one", "engine", "rank 0")
membership.beat()
print("joined", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def page():
    descriptor = death_notice.create()
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_notice_is_given_when_the_process_is_killed(page, number):
    command = [sys.executable, "-c", GIVES, str(page)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[page]) as process:
        process.stdout.readline()
        noticed = []
        waiting = threading.Thread(target=lambda: noticed.append(death_notice.Notice(page).wait()))
        waiting.start()
        process.send_signal(number)
        waiting.join(30)
    assert noticed == [True]


def test_nobody_is_waited_for_when_the_page_has_no_owner(page):
    assert not death_notice.Notice(page).wait()


def test_wait_ends_when_the_kernel_gives_no_notice_and_the_exit_is_known(page):
    with mmap.mmap(page, mmap.PAGESIZE) as word:
        word[:4] = (WAITERS | 7).to_bytes(4, "little")
    notice = death_notice.Notice(page)
    waiting = threading.Thread(target=notice.wait)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    notice.end()
    waiting.join(30)
    assert not waiting.is_alive()


class Refusing:
    """The C library in a process that may not ask for a notice."""

    def __init__(self, raises):
        self.raises = raises

    def syscall(self, *_):
        if self.raises:
            raise ValueError("out of everything")
        ctypes.set_errno(1)
        return -1


@pytest.mark.parametrize("raises", [False, True])
def test_caller_is_told_when_no_notice_can_be_given(page, monkeypatch, raises):
    monkeypatch.setattr(death_notice, "_libc", Refusing(raises))
    with pytest.raises(ProtocolError, match="no notice of death"):
        death_notice.give_at_death(page)
    assert not death_notice.Notice(page).wait()
    assert not [thread for thread in threading.enumerate() if thread.name == "gms-death-notice"]


def test_caller_is_told_when_the_machine_is_not_known(page, monkeypatch):
    monkeypatch.setattr(death_notice, "_SYSCALLS", {})
    with pytest.raises(ProtocolError, match="not known"):
        death_notice.give_at_death(page)


def test_caller_is_told_when_no_thread_can_be_started(page, monkeypatch):
    def no_thread(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with pytest.raises(ProtocolError, match="can't start new thread"):
        death_notice.give_at_death(page)


def test_process_lives_in_its_cohort_when_it_can_give_no_notice(server):
    command = [sys.executable, "-c", JOINS, os.fspath(server.socket)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "joined\n"
        with server.connect() as session:
            assert [cohort.state for cohort in session.status().cohorts] == ["alive"]
        process.kill()
    with server.connect() as session:
        while session.status().cohorts:
            pass
