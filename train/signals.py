"""SIGINT and SIGTERM as a wish to stop, which is granted at a good moment."""

import signal
from types import FrameType
from typing import Self


class StopRequests:
    """While active, SIGINT and SIGTERM are noted in `number`, the last one's, and handed to `react`.

    A signal that was ignored before stays so: nohup, or a script's `&`, means just that.
    """

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> Self:
        wanted = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def react(self, number: int) -> None:
        """What happens at once; nothing, unless a subclass knows better."""

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.react(number)
