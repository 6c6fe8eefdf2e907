"""A program on a terminal of its own, for tests that type and read."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\x1b\][^\x07]*\x07|\r")


class Terminal:
    """Runs a program on a terminal of 100 columns and 30 lines while it is open."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._file, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        # Its size is that of the terminal, whatever the terminal of the tests has.
        environment = {k: v for k, v in environment.items() if k not in ("COLUMNS", "LINES")}
        # Its own session, so that Ctrl-C on the terminal is a signal to it.
        self._process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *arguments],
            stdin=end, stdout=end, stderr=end, env=environment,
        )  # fmt: skip
        os.close(end)
        self._unread = ""
        self.shown = ""
        """All that was written so far, without the codes that move and colour."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._file)

    def type(self, keys: str) -> None:
        os.write(self._file, keys.encode())

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """Reads until a text comes; what came since the last call, that text included."""
        deadline = time.monotonic() + seconds
        while text not in self._unread:
            if not self._read(deadline):
                raise AssertionError(f"{text!r} never came; there was {self._unread!r}")
        before, _, self._unread = self._unread.partition(text)
        return before + text

    def wait_for_end(self, seconds: float = 120) -> int:
        """Reads until the program ends; its exit status."""
        while self._read(time.monotonic() + seconds):
            pass
        return self._process.wait(seconds)

    def _read(self, deadline: float) -> bool:
        """Whether there was more before the deadline and before the program ended."""
        ready, _, _ = select.select([self._file], [], [], max(0, deadline - time.monotonic()))
        try:
            data = os.read(self._file, 65536) if ready else b""
        except OSError:  # how a terminal ends on Linux
            data = b""
        text = _CONTROLS.sub("", data.decode(errors="replace"))
        self._unread += text
        self.shown += text
        return bool(data)
