"""A bag being written: an mcap file under a hidden name until it is whole, which an interrupted run goes on with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mcap.records import Channel, Message, Metadata, Schema
from mcap.stream_reader import StreamReader
from mcap.writer import Writer

from densegeo import __version__
from densegeo.ros.bag_input import STORE

NOTE = "densegeo"  # the metadata record that says what a file is made from
CHUNK = 4 << 20  # bytes: the most that a killed run does again


class Written(NamedTuple):
    """A message, and the number of the image that it was made from: its mcap sequence number."""

    topic: str
    kind: str
    data: bytes
    time: int
    image: int


class Done(NamedTuple):
    """images: how many an interrupted run had come to; written: of how many there are results, the rest failed."""

    images: int = 0
    written: int = 0


class Output:
    """path: where the bag will be. note: what it is made from; a partial file with another note starts anew."""

    def __init__(self, path: Path, note: Mapping[str, str]) -> None:
        self.path, self.partial = path, path.with_name(f".{path.name}.partial")
        self._note = dict(note)
        self._channels: dict[str, int] = {}
        self._writer: Any = None  # while open; mcap's types are incomplete
        self._discarded = False

    @contextmanager
    def open(self) -> Iterator[Done]:
        """Gives how many images are done already. The file takes its name when the block ends; when that raises, it
        stays under its hidden one, unless it is discarded.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f".{self.path.name}.new")
        with open(fresh, "wb") as stream:
            self._writer = Writer(stream, chunk_size=CHUNK)
            self._writer.start(profile="ros2", library=f"densegeo {__version__}")
            self._writer.add_metadata(NOTE, self._note)
            earlier = self._take_over()
            os.replace(fresh, self.partial)
            try:
                yield earlier
            finally:
                self._writer.finish()
                stream.flush()
                os.fsync(stream.fileno())
                if self._discarded:
                    self.partial.unlink()
        os.replace(self.partial, self.path)

    def discard(self) -> None:
        """Leave nothing behind; for a block that then raises."""
        self._discarded = True

    def write(self, topic: str, kind: str, message: Any, time: int, image: int) -> None:
        """One message, of a type of `STORE`. image: its number, from 0, in the order in which images are written."""
        self._add(Written(topic, kind, bytes(STORE.serialize_cdr(message, kind)), time, image))

    def _add(self, message: Written) -> None:
        if message.topic not in self._channels:
            text = STORE.generate_msgdef(message.kind, ros_version=2)[0]
            schema = self._writer.register_schema(message.kind, "ros2msg", text.encode())
            self._channels[message.topic] = self._writer.register_channel(message.topic, "cdr", schema)
        self._writer.add_message(self._channels[message.topic], message.time, message.data, message.time, message.image)

    def _take_over(self) -> Done:
        """What an interrupted run wrote, without its last image, of which messages may be missing."""
        group: list[Written] = []
        earlier = Done()
        for message in self._earlier():
            if group and group[0].image != message.image:
                for written in group:
                    self._add(written)
                group = []
                earlier = Done(message.image, earlier.written + 1)
            group.append(message)
        return earlier

    def _earlier(self) -> Iterator[Written]:
        """The messages of the partial file as far as it can be read; none of one with another note."""
        if not self.partial.exists():
            return
        schemas: dict[int, Schema] = {}
        channels: dict[int, Channel] = {}
        noted = False
        with open(self.partial, "rb") as stream:
            try:
                for record in StreamReader(stream, validate_crcs=True).records:
                    if isinstance(record, Metadata) and record.name == NOTE:
                        noted = record.metadata == self._note
                    elif isinstance(record, Schema):
                        schemas[record.id] = record
                    elif isinstance(record, Channel):
                        channels[record.id] = record
                    elif isinstance(record, Message) and noted:
                        channel = channels[record.channel_id]
                        kind = schemas[channel.schema_id].name
                        yield Written(channel.topic, kind, record.data, record.log_time, record.sequence)
            except Exception:  # where it was cut; what is raised then is of many types
                return
