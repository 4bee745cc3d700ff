"""A camera's RTSP server (RFC 2326) for one client over TCP; its packets are made by FFmpeg's own RTP muxer."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

_SDP = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:track\r\n"  # MPEG-TS


@contextmanager
def rtsp_camera(frames: Sequence[np.ndarray], rate: int = 25) -> Iterator[str]:
    """The address of a camera that plays these frames (H.264) at their rate, and then hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        thread = threading.Thread(target=_serve, args=(server, frames, rate), daemon=True)
        thread.start()
        try:
            yield f"rtsp://127.0.0.1:{server.getsockname()[1]}/stream"
        finally:
            server.close()
            thread.join(timeout=20)


def _serve(server: socket.socket, frames: Sequence[np.ndarray], rate: int) -> None:
    try:
        client, _ = server.accept()
    except OSError:  # nobody came
        return
    with client, client.makefile("rb") as requests:
        try:
            _until_play(client, requests)
            _play(client, frames, rate)
        except OSError:  # the client went away
            return


def _until_play(client: socket.socket, requests: Iterator[bytes]) -> None:
    """Answer requests until the client wants the stream."""
    method, number = "", "0"
    for line in requests:
        if line.strip():
            if match := re.match(rb"(\w+) rtsp://\S+ RTSP/1.0", line):
                method = match[1].decode()
            if match := re.match(rb"CSeq: (\d+)", line, re.IGNORECASE):
                number = match[1].decode()
            continue
        head, body = f"RTSP/1.0 200 OK\r\nCSeq: {number}\r\nSession: 1\r\n", ""
        if method == "OPTIONS":
            head += "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
        elif method == "DESCRIBE":
            body = _SDP
            head += f"Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n"
        elif method == "SETUP":
            head += "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n"
        client.sendall(f"{head}\r\n{body}".encode())
        if method == "PLAY":
            return


def _play(client: socket.socket, frames: Sequence[np.ndarray], rate: int) -> None:
    """RTP packets, as FFmpeg sends them to a local port, each behind "$", its channel and its length."""
    import av

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as packets:
        packets.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        packets.bind(("127.0.0.1", 0))
        packets.settimeout(0.01)
        address = f"rtp://127.0.0.1:{packets.getsockname()[1]}?rtcpport=9"
        with av.open(address, "w", format="rtp_mpegts") as container:
            stream = container.add_stream("libx264", rate=rate, options={"tune": "zerolatency", "g": "5"})
            stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], "yuv420p"
            started = time.monotonic()
            for index, pixels in enumerate(frames):
                time.sleep(max(0.0, started + index / rate - time.monotonic()))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                _forward(packets, client)
            container.mux(stream.encode())
        _forward(packets, client)


def _forward(packets: socket.socket, client: socket.socket) -> None:
    while True:
        try:
            packet = packets.recv(65536)
        except TimeoutError:
            return
        client.sendall(struct.pack(">cBH", b"$", 0, len(packet)) + packet)
