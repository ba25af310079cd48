"""The codec: every cut of a stream gives the same frames, and nothing that a peer sends costs more than its connection."""

import contextlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gms_core.errors import ProtocolError
from gms_core.layout import Allocation, Identity, Layout
from gms_core.protocol.framing import HEADER, MAGIC, FrameDecoder, batches, decode_reply, decode_request, encode
from gms_core.protocol.messages import Acquire, Allocate, Descriptors, Done, Failure, Hello, ReadGranted, Status, Welcome

MESSAGES = [
    Hello((1,), "test", "host"),
    Acquire("weights", "auto", Identity({"model": "m"}), 1.5),
    Allocate("weights", (4096, 8192), 1.0),
    Status(),
]
REPLIES = [
    Welcome(1, "0.1", "host", "host", 4096, 7),
    ReadGranted("weights", Layout(3, Identity({"a": "b"}), (Allocation(1, 0, 4096),), b"manifest", "digest")),
    Descriptors((1, 2), (3, 4), more=True),
    Failure("pool_not_found", "no", "hint", {"a": "b"}),
    Done(),
]


@pytest.fixture
def open_descriptor():
    reading, writing = os.pipe()
    os.close(writing)
    yield reading
    with contextlib.suppress(OSError):
        os.close(reading)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_request_comes_back_when_encoded_and_decoded(message):
    (frame,) = FrameDecoder().feed(encode(message))
    assert decode_request(frame.payload) == message


@pytest.mark.parametrize("message", REPLIES, ids=lambda message: type(message).__name__)
def test_reply_comes_back_when_encoded_and_decoded(message):
    (frame,) = FrameDecoder().feed(encode(message))
    assert decode_reply(frame.payload) == message


@given(st.lists(st.sampled_from(MESSAGES), min_size=1, max_size=6), st.data())
def test_frames_are_the_same_when_the_stream_is_cut_anywhere(messages, data):
    stream = b"".join(encode(message) for message in messages)
    decoder, frames, start = FrameDecoder(), [], 0
    while start < len(stream):
        end = data.draw(st.integers(start + 1, len(stream)))
        frames += decoder.feed(stream[start:end])
        start = end
    assert [decode_request(frame.payload) for frame in frames] == messages
    assert not decoder.incomplete


@given(st.binary(min_size=1, max_size=200))
def test_random_bytes_are_refused_or_incomplete_when_they_are_no_frame(data):
    decoder = FrameDecoder()
    try:
        for frame in decoder.feed(data):
            decode_request(frame.payload)
    except ProtocolError:
        return
    assert decoder.incomplete
    assert MAGIC.startswith(data[:4])


@given(st.binary(max_size=100))
def test_payload_is_refused_when_it_is_no_message(data):
    with pytest.raises(ProtocolError):
        decode_reply(b"\x81\xa4type\xa4none" + data)
    with pytest.raises(ProtocolError):
        decode_request(b"\x82\xa4type\xa7release\xa4pool\xa1\xff" + data)


def test_stream_is_refused_at_its_first_byte_when_it_is_another_protocol():
    with pytest.raises(ProtocolError, match="does not speak"):
        FrameDecoder().feed(b"HTTP/1.1 400 Bad Request")


def test_payload_is_refused_before_it_arrives_when_it_is_too_large():
    with pytest.raises(ProtocolError, match="announced a message"):
        FrameDecoder(max_payload=100).feed(HEADER.pack(MAGIC, 101, 0))


def test_descriptors_are_closed_when_none_are_allowed(open_descriptor):
    decoder = FrameDecoder(max_descriptors=0)
    with pytest.raises(ProtocolError, match="descriptors"):
        decoder.feed(encode(Status()), [open_descriptor])
    decoder.close()
    with pytest.raises(OSError):
        os.fstat(open_descriptor)


def test_frame_is_refused_when_descriptors_are_missing():
    with pytest.raises(ProtocolError, match="announced 2 descriptors and sent 0"):
        FrameDecoder().feed(encode(Done(), descriptors=2))


def test_descriptors_stay_with_their_frame_when_several_frames_carry_some():
    pipes = [os.pipe() for _ in range(2)]
    numbers = [number for pipe in pipes for number in pipe]
    try:
        decoder = FrameDecoder()
        first = decoder.feed(encode(Done(), descriptors=1) + encode(Done(), descriptors=3), numbers)
        assert [frame.descriptors for frame in first] == [tuple(numbers[:1]), tuple(numbers[1:])]
    finally:
        for number in numbers:
            os.close(number)


@pytest.mark.parametrize(("count", "pieces"), [(0, [0]), (1, [1]), (253, [253]), (254, [253, 1]), (600, [253, 253, 94])])
def test_allocations_are_cut_into_pieces_when_they_exceed_one_message(count, pieces):
    assert [len(piece) for piece in batches(list(range(count)))] == pieces
