"""The codec and the decoding of messages under a fuzzer that looks at which code an input reaches: ``pip install 'gms[fuzz]'``.

    python -m tests.fuzz.coverage_guided -runs=1000000 -seed=7

It sees the branches of the Python code; msgspec, which is compiled, is a black box to it. It ends with an error, and writes the input to a file, as
soon as anything is raised but `ProtocolError`, a frame comes out whose bytes were not there, or the decoder holds more than it was given.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["gms_core.protocol"]):
    from gms_core.errors import ProtocolError
    from gms_core.protocol.framing import HEADER, FrameDecoder, decode_reply, decode_request, encode

MOST = 4096
"""Bytes of a payload: small, so that its limit is reached too."""


def one(data: bytes) -> None:
    """Feed an input in pieces, decode whatever comes out, and see that what is understood can be said again."""
    chance = atheris.FuzzedDataProvider(data)
    decoder, given, taken = FrameDecoder(MOST, max_descriptors=0), 0, 0
    raw = chance.ConsumeBool()
    try:
        while chance.remaining_bytes():
            piece = chance.ConsumeBytes(chance.ConsumeIntInRange(1, 512))
            if not raw:  # a good header, so that the fuzzer spends its time on messages
                piece = HEADER.pack(b"GMS1", len(piece), 0) + piece
            given += len(piece)
            for frame in decoder.feed(piece):
                taken += len(frame.payload) + HEADER.size
                for decode in (decode_request, decode_reply):
                    try:
                        message = decode(frame.payload)
                    except ProtocolError:
                        continue
                    if message == message:  # not so with a NaN in it
                        assert decode(encode(message)[HEADER.size :]) == message
            assert decoder.buffered == given - taken
    except ProtocolError:
        pass
    finally:
        decoder.close()


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
