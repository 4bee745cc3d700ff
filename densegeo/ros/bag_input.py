"""ROS 2 bags, mcap or sqlite3, as messages in their order; what can still be read of one that was cut off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mcap.exceptions import EndOfFile, InvalidMagic
from mcap.records import Channel, Message, Schema
from mcap.stream_reader import StreamReader
from rosbags.rosbag2 import Reader, ReaderError
from rosbags.typesys import Stores, get_typestore

from densegeo.errors import BagError

STORE = get_typestore(Stores.LATEST)  # the standard messages have kept their fields; see the tests


class Item(NamedTuple):
    """time: nanoseconds at which it was recorded. data: CDR."""

    topic: str
    time: int
    data: bytes


@dataclass
class Bag:
    """topics: name -> type; counts: name -> messages. cut: why its end is missing, or ""."""

    path: Path
    topics: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    cut: str = ""

    @classmethod
    def open(cls, path: Path) -> Bag:
        """Look at a bag: a .mcap or .db3 file, or the folder that `ros2 bag record` makes.

        Raises BagError for anything else, and for one without a readable message.
        """
        if not path.exists():
            raise BagError(f"{path} does not exist. Check the path.")
        if path.is_dir() and not (path / "metadata.yaml").exists():
            parts = sorted(file.name for file in path.iterdir() if file.suffix in (".mcap", ".db3"))
            hint = f" It holds {', '.join(parts)}: give one of these." if parts else ""
            raise BagError(f"{path} has no metadata.yaml, so it is no complete bag.{hint}")
        bag = cls(path)
        try:
            with Reader(path) as reader:
                for connection in reader.connections:
                    bag.topics[connection.topic] = connection.msgtype
                    bag.counts[connection.topic] += connection.msgcount
        except Exception as error:  # what rosbags raises for damage is of many types
            if path.suffix != ".mcap":
                raise BagError(f"{path} cannot be read as a ROS 2 bag: {error}.") from error
            bag._count_cut(error)
            if not bag.counts.total():
                raise BagError(f"{path} is no mcap file, or nothing of it can be read: {bag.cut}.") from error
        if not bag.counts.total():
            raise BagError(f"{path} holds no messages.")
        return bag

    def messages(self, topics: Collection[str]) -> Iterator[Item]:
        """Of these topics, in the order of their times (of a bag that was cut: as they were written).

        Raises BagError for one that cannot be read on.
        """
        if self.cut:
            for kind, item in self._cut_messages():
                if kind and item.topic in topics:
                    yield item
            return
        try:
            with Reader(self.path) as reader:
                chosen = [connection for connection in reader.connections if connection.topic in topics]
                for connection, time, data in reader.messages(chosen) if chosen else ():
                    yield Item(connection.topic, time, bytes(data))
        except (ReaderError, OSError, ValueError) as error:
            raise BagError(f"{self.path} cannot be read on: {error}.") from error

    def decode(self, item: Item) -> Any:
        """A message's fields. Raises BagError where its bytes are not its type's."""
        try:
            return STORE.deserialize_cdr(item.data, self.topics[item.topic])
        except Exception as error:
            raise BagError(
                f"A message on {item.topic} is no {self.topics[item.topic]}: {type(error).__name__}: {error}."
            ) from error

    def _count_cut(self, why: Exception) -> None:
        for kind, item in self._cut_messages():
            self.topics[item.topic] = kind
            self.counts[item.topic] += 1
        self.cut = self.cut or f"its index cannot be read ({why})"

    def _cut_messages(self) -> Iterator[tuple[str, Item]]:
        """(type, message) of every whole chunk of a file whose end is missing."""
        schemas: dict[int, Schema] = {}
        channels: dict[int, Channel] = {}
        try:
            with open(self.path, "rb") as stream:
                for record in StreamReader(stream, validate_crcs=True).records:
                    if isinstance(record, Schema):
                        schemas[record.id] = record
                    elif isinstance(record, Channel):
                        channels[record.id] = record
                    elif isinstance(record, Message):
                        channel = channels[record.channel_id]
                        yield schemas[channel.schema_id].name, Item(channel.topic, record.log_time, record.data)
        except InvalidMagic:
            self.cut = "it does not begin as one"
        except EndOfFile:
            self.cut = "it was cut off"
        except Exception as error:  # what is raised for damage is of many types, of compression libraries too
            self.cut = f"it is damaged ({type(error).__name__}: {error})"
