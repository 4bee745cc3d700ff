"""Small films, with what cameras and telephones do: uneven times, turned pictures, streams over HTTP."""

from __future__ import annotations

import io
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

CLOCK = Fraction(1, 600)
# a display matrix: turn right by 90 degrees
QUARTER = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)


def pictures(count: int, width: int = 96, height: int = 64) -> list[np.ndarray]:
    """A light square that wanders over a slope from the top left to the right; the top left corner is red."""
    y, x = np.mgrid[0:height, 0:width]
    frames = []
    for index in range(count):
        image = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 90)], axis=-1).astype(np.uint8)
        left = index * (width - 16) // max(1, count - 1)
        image[24:40, left : left + 16] = 255
        image[:16, :16] = (255, 0, 0)
        frames.append(image)
    return frames


def write_film(path: Path, frames: Sequence[np.ndarray], times: Sequence[float], *, turned: bool = False) -> Path:
    """An MP4 file of frames at these seconds; turned: it asks to be shown turned right by 90 degrees."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30, options={"qscale": "2"})
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], "yuv420p"
        stream.codec_context.time_base = stream.time_base = CLOCK
        stream.bit_rate = 4_000_000
        for pixels, seconds in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(seconds / CLOCK), CLOCK
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if turned:
        data = bytearray(path.read_bytes())
        at = data.index(b"tkhd") + 4 + 40  # ISO/IEC 14496-12, 8.3.2, version 0
        data[at : at + 36] = QUARTER
        path.write_bytes(data)
    return path


@contextmanager
def http_camera(frames: Sequence[np.ndarray]) -> Iterator[str]:
    """The address of a camera that sends these frames as motion JPEG, and then ends."""

    class Camera(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace;boundary=frame")
            self.end_headers()
            for pixels in frames:
                data = io.BytesIO()
                Image.fromarray(pixels).save(data, "JPEG", quality=95)
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {data.tell()}\r\n\r\n"
                try:
                    self.wfile.write(head.encode() + data.getvalue() + b"\r\n")
                except OSError:  # the client went away
                    return

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/stream.mjpg"
    finally:
        server.shutdown()
        server.server_close()
