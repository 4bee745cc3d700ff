"""A request's body, read whole: within bytes, within seconds, unpacked, and given up when the client leaves."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import TypeVar

from starlette.requests import Request

from densegeo.errors import BodyTooLargeError, MediaTypeError, RequestError, SlowRequestError
from densegeo.serving.options import Options
from densegeo.serving.service import Service

# `deflate` means zlib's format, RFC 9110 section 8.4.1.2; 32 + 15 bits: gzip or zlib, by the header.
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed the connection; nobody waits for an answer."""


async def read_body(request: Request, service: Service, options: Options) -> bytes:
    """The whole body, unpacked (in one of the service's threads).

    Raises BodyTooLargeError, SlowRequestError, MediaTypeError for an encoding, RequestError for damaged data,
    ClientGoneError.
    """
    windows = _encoding(request)
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > options.max_body:
        raise _too_large(options)
    body = bytearray()
    try:
        await asyncio.wait_for(_collect(request, body, options), options.body_s)
    except asyncio.TimeoutError:
        raise SlowRequestError(
            f"The body did not arrive within {options.body_s:g} s; {len(body)} bytes did. Send it faster or smaller."
        ) from None
    whole = bytes(body)
    return whole if windows is None else await service.run(lambda: unpack(whole, windows, options))


async def parts(body: bytes) -> AsyncGenerator[bytes, None]:
    """A body that was read, as the stream that a parser takes."""
    yield body
    yield b""


def unpack(body: bytes, windows: int, options: Options) -> bytes:
    """Decompressed as far as the limit. Raises BodyTooLargeError, RequestError."""
    machine = zlib.decompressobj(windows)
    try:
        unpacked = machine.decompress(body, options.max_body + 1)
    except zlib.error as error:
        raise RequestError(f"The body cannot be unpacked: {str(error).rstrip('.')}.") from None
    if len(unpacked) > options.max_body:
        raise _too_large(options)
    if not machine.eof or machine.unused_data:
        raise RequestError("The packed body is not one whole stream: it is cut off, or something follows it.")
    return unpacked


async def unless_gone(work: Awaitable[T], request: Request) -> T:
    """The result of `work`, which is cancelled when the client closes the connection. Raises ClientGoneError then."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        watch.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection; what it still sends is thrown away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _encoding(request: Request) -> int | None:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        return None
    if encoding not in _WINDOWS:
        raise MediaTypeError(f"A body encoded as {encoding[:40]!r} is not read: send gzip, deflate or none.")
    return _WINDOWS[encoding]


async def _collect(request: Request, body: bytearray, options: Options) -> None:
    async for chunk in _chunks(request):
        body += chunk
        if len(body) > options.max_body:
            raise _too_large(options)


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _too_large(options: Options) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"The body, unpacked, is larger than this server's limit of {options.max_body} bytes. Send a smaller picture, "
        "or start the server with a larger --max-body."
    )
