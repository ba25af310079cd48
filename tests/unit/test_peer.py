"""What arrives with a message: descriptors that are closed at exec, and an error when the kernel could not deliver all of them."""

import contextlib
import os
import resource
import socket

import pytest

from gms_core.errors import ProtocolError
from gms_core.protocol.peer import peer_credentials, receive, send


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
