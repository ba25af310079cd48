"""What arrives with a message: descriptors that are closed at exec, and an error when the kernel could not deliver all of them."""

import contextlib
import errno
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gms_core.errors import ProtocolError
from gms_core.protocol.peer import open_peer_pidfd, peer_credentials, receive, send


@pytest.fixture
def ends():
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(end) for end in socket.socketpair()]


@pytest.fixture
def few_descriptors():
    """Allow two more open files than there are."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.dup(0)
    os.close(probe)
    yield lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (probe + 2, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_descriptors_are_closed_at_exec_when_they_arrive(ends):
    send(ends[0], b"x", (0, 1))
    data, descriptors = receive(ends[1])
    try:
        assert data == b"x"
        assert len(descriptors) == 2
        assert not any(os.get_inheritable(number) for number in descriptors)
    finally:
        for number in descriptors:
            os.close(number)


def test_cut_off_descriptors_are_an_error_when_the_receiver_has_no_room(ends, few_descriptors):
    send(ends[0], b"x", (0,) * 10)
    listed = os.listdir("/proc/self/fd")
    few_descriptors()
    with pytest.raises(ProtocolError, match="lost on the way"):
        receive(ends[1])
    assert len(os.listdir("/proc/self/fd")) == len(listed)


def test_credentials_are_the_kernels_when_a_peer_connects(ends):
    assert peer_credentials(ends[0]) == (os.getpid(), os.getuid(), os.getgid())


class OlderKernel(socket.socket):
    """A socket of a kernel that answers the question for the peer's pidfd by an error."""

    error = errno.ENOPROTOOPT

    def getsockopt(self, *arguments):
        if len(arguments) == 2:
            raise OSError(self.error, os.strerror(self.error))
        return super().getsockopt(*arguments)


@pytest.fixture
def older(ends):
    with OlderKernel(fileno=ends[0].detach()) as connection:
        yield connection


def test_pidfd_is_of_the_peer_when_the_kernel_is_asked_for_it(ends):
    pidfd = open_peer_pidfd(ends[0], 0)
    try:
        assert f"Pid:\t{os.getpid()}\n" in Path(f"/proc/self/fdinfo/{pidfd}").read_text()
        assert not os.get_inheritable(pidfd)
    finally:
        os.close(pidfd)


def test_pidfd_is_of_the_peer_when_only_its_number_is_known_and_it_is_still_connected(older):
    os.close(open_peer_pidfd(older, os.getpid()))


def test_no_pidfd_is_given_by_number_when_the_peer_has_closed_its_end(older, ends):
    ends[1].close()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ProcessLookupError):
        open_peer_pidfd(older, os.getpid())  # the number of a process that lives, as it would be if it had been given away
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ESRCH])
def test_no_pidfd_is_given_by_number_when_the_kernel_says_that_the_peer_is_gone(older, error):
    older.error = error
    with pytest.raises(OSError, match=os.strerror(error)):
        open_peer_pidfd(older, os.getpid())


def test_pidfd_is_of_no_other_process_when_the_peer_has_exited(tmp_path):
    path = str(tmp_path / "socket")
    program = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(flush=True); sys.stdin.read()"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        with subprocess.Popen([sys.executable, "-c", program, path], stdin=subprocess.PIPE) as peer:
            connection, _ = listening.accept()
            pid = peer.pid
            peer.communicate()
        with connection, contextlib.ExitStack() as stack:
            try:
                pidfd = open_peer_pidfd(connection, pid)
            except OSError:
                return
            stack.callback(os.close, pidfd)
            assert select.select([pidfd], [], [], 0)[0], "it is of a process that has exited"
            with pytest.raises(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, 0)
