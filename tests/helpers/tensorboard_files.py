"""Reads what the TensorBoard tracker wrote, without TensorBoard."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest


def scalars(folder: Path) -> Iterator[tuple[str, int, float]]:
    """(name, step, value) of each scalar in TensorBoard's files: records of length, checksum, event, checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    for file in sorted(folder.glob("events.out.tfevents.*")):
        content, offset = file.read_bytes(), 0
        while offset < len(content):
            (length,) = struct.unpack_from("<Q", content, offset)
            event = event_pb2.Event.FromString(content[offset + 12 : offset + 12 + length])
            for value in event.summary.value:
                yield value.tag, event.step, value.simple_value
            offset += length + 16
