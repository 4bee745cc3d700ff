"""Clients that ask a server as well and as badly as clients do, and know what became of every request."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

SIDE = 16


def inference(level: float, side: int = SIDE) -> tuple[bytes, int]:
    """A request's body in bytes for a grey picture, and its JSON's length."""
    pixels = np.full((side, side, 3), round(255 * level), np.uint8).tobytes()
    tensor = {
        "name": "image",
        "shape": [side, side, 3],
        "datatype": "UINT8",
        "parameters": {"binary_data_size": len(pixels)},
    }
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return header + pixels, len(header)


BAD = (b"", b"{", b"[]", b'{"inputs": []}', b'{"inputs": [{"name": "image", "shape": [2, 2, 3], "datatype": "UINT8"}]}')


@dataclass
class Tally:
    """ends: kind of request and how it ended ("200", "left", "unanswered") -> how often."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    sent: int = 0

    def of(self, kind: str) -> dict[str, int]:
        return {end: count for (name, end), count in self.ends.items() if name == kind}


class Client:
    """One connection after the other, one request at a time; raises when an answer is not that of its request."""

    def __init__(self, port: int, models: tuple[str, ...], tally: Tally, seed: int) -> None:
        self._port, self._models, self._tally, self._random = port, models, tally, random.Random(seed)
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._name = seed

    async def run(self, requests: int) -> None:
        for number in range(requests):
            kind = self._random.choices(("good", "bad", "leaves", "slow"), (70, 10, 10, 10))[0]
            self._tally.sent += 1
            try:
                end = await asyncio.wait_for(self._request(kind, f"{self._name}-{number}"), 60)
            except (ConnectionError, asyncio.IncompleteReadError):
                end = "unanswered"
                await self._close()
            self._tally.ends[kind, end] += 1
        if self._reader is not None:  # nothing more comes than was asked for
            assert not self._reader._buffer  # type: ignore[attr-defined]
        await self._close()

    async def _request(self, kind: str, name: str) -> str:
        body, length = inference(self._random.uniform(0.5, 0.7))
        if kind == "bad":
            body, length = self._random.choice(BAD), 0
        stalls = kind == "slow" and self._random.random() < 0.05
        head = [f"POST /v2/models/{self._random.choice(self._models)}/infer HTTP/1.1", "Host: localhost"]
        head += [f"Content-Length: {len(body)}", f"X-Request-ID: {name}"]
        head += [f"Inference-Header-Content-Length: {length}"] if length else []
        writer = await self._connected()
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n")
        if kind == "slow":
            for part in range(3):
                writer.write(body[part * len(body) // 4 : (part + 1) * len(body) // 4])
                await asyncio.sleep(self._random.uniform(0, 0.02))
            if not stalls:
                writer.write(body[3 * len(body) // 4 :])
        else:
            writer.write(body)
        await writer.drain()
        if kind == "leaves":
            await asyncio.sleep(self._random.uniform(0, 0.005))
            await self._close()
            return "left"
        return await self._answer(name)

    async def _answer(self, name: str) -> str:
        assert self._reader is not None
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in head[1:] if line)}
        await self._reader.readexactly(int(headers["content-length"]))
        assert headers["x-request-id"] == name, "another request's answer"
        status = head[0].split()[1]
        if headers.get("connection") == "close" or status == "408":
            await self._close()
        return status

    async def _connected(self) -> asyncio.StreamWriter:
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self._writer

    async def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


async def load(port: int, models: tuple[str, ...], requests: int, connections: int) -> Tally:
    """So many requests from so many connections, each one's share."""
    tally = Tally()
    clients = [Client(port, models, tally, seed) for seed in range(connections)]
    await asyncio.gather(*(client.run(-(-requests // connections)) for client in clients))
    return tally
