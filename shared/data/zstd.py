"""Reading zstandard files."""

from __future__ import annotations

import io
from typing import IO, Any

import zstandard


def open_frames(raw: IO[bytes]) -> IO[bytes]:
    """The uncompressed bytes of a file of one or more frames.

    Reading raises EOFError if the data is damaged or truncated.
    """
    return io.BufferedReader(_Frames(raw), 1 << 20)


class _Frames(io.RawIOBase):
    """Concatenated frames. The library's own reader accepts a truncated frame."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            left = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            block = left or self._raw.read(1 << 18)
            if not block:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the last frame is cut short")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(block)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
