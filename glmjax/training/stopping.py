"""How SIGTERM and SIGINT end a run: all processes of a job after the same step."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Stop:
    """Whether a signal asked this run to end."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self.signal: signal.Signals | None = None
        """The signal that `requested` has answered for."""

    def requested(self, step: int) -> bool:
        """Whether to end before this step; all processes ask before every step and agree."""
        if jax.process_count() > 1:
            # jax passes the news on in the background; to ask costs no communication.
            if multihost_utils.reached_preemption_sync_point(step):
                self.signal = signal.SIGTERM
        elif self.received:
            self.signal = self.received[0]
        return self.signal is not None


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Takes SIGTERM and SIGINT as a request to end; a second SIGINT interrupts at once.

    In a job of several processes jax takes SIGTERM itself, and SIGINT is passed on as one.
    """
    stop = Stop()

    def receive(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.received:
            raise KeyboardInterrupt
        stop.received.append(signal.Signals(number))
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
