"""Is this a whole SentencePiece model? Its protobuf, read field by field; nothing is encoded with it.

A ModelProto: the pieces (field 1, many), how it was trained (2) and how it normalises (3), written in this order, so a
file that is cut between two fields lacks the last ones.
Source: sentencepiece's sentencepiece_model.proto; protobuf's encoding guide.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from reshard.errors import DataError

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # of ModelProto
_TEXT, _SCORE, _TYPE = 1, 2, 3  # of a piece
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_MOST_VARINT_BYTES = 10


def is_sentencepiece(data: bytes) -> bool:
    """Does it begin like one? Its first byte is the tag of its first piece, which is no letter of base64."""
    return data[:1] == b"\n" or b"<unk>" in data[:200]


def check_sentencepiece(file: Path, data: bytes) -> int:
    """The number of pieces of a whole SentencePiece model. Raises DataError."""
    seen: set[bytes] = set()
    parts: set[int] = set()
    try:
        for field, value in _fields(data):
            parts.add(field)
            if field == _PIECES:
                text = _piece(value)
                if text in seen:
                    raise ValueError(f"the piece {text.decode()!r} is there twice")
                seen.add(text)
            elif field in (_TRAINER, _NORMALIZER):
                for _ in _fields(_message(value)):
                    pass
    except ValueError as error:
        raise DataError(f"tokenizer {file} is a SentencePiece model that is damaged: {error}", path=file) from None
    lacking = [
        what
        for what, field in (("pieces", _PIECES), ("trainer's settings", _TRAINER), ("normalizer", _NORMALIZER))
        if field not in parts
    ]
    if lacking:
        raise DataError(
            f"tokenizer {file} is a SentencePiece model that is cut short: it has no {' and no '.join(lacking)}",
            path=file,
        )
    return len(seen)


def _piece(value: bytes | int) -> bytes:
    """The text of a piece. Raises ValueError where it is none."""
    text = b""
    for field, inner in _fields(_message(value)):
        if field == _TEXT:
            text = _message(inner)
        elif (field == _SCORE and not isinstance(inner, bytes)) or (field == _TYPE and not isinstance(inner, int)):
            raise ValueError("a piece's score or type is none")
    if not text or b"\0" in text:
        raise ValueError(f"a piece's text is {text!r}")
    text.decode()
    return text


def _message(value: bytes | int) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a message is expected")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, value) of each field of a message: bytes as they are, also of floats, and whole numbers. Raises ValueError."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, wire = tag >> 3, tag & 7
        if field == 0:
            raise ValueError(f"a field without a number at byte {at - 1}")
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield field, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = struct.calcsize("<I" if wire == _FIXED32 else "<Q")
        else:
            raise ValueError(f"a field of type {wire} at byte {at - 1}")
        if at + size > len(data):
            raise ValueError(f"it ends at byte {len(data)}, {at + size - len(data)} bytes early")
        yield field, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(data[at : at + _MOST_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError(
        f"it ends at byte {len(data)}, within a number"
        if at + _MOST_VARINT_BYTES > len(data)
        else "a number without end"
    )
