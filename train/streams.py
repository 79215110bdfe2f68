"""Reading a `datasets` dataset of the hub through errors of the network: what passes is waited for, a few times."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from train.data import DataError

ATTEMPTS = 8  # in a row without a row being read
LONGEST_WAIT = 60  # seconds; waits are 1, 2, 4, ...
PASSING = (408, 425, 429)  # answers, besides those of 500 and more, that ask to try again later
# Errors of these are of the network: `datasets` speaks through one or another of them.
NETWORK_LIBRARIES = ("aiohttp", "httpcore", "httpx", "requests", "socket", "ssl", "urllib3")

Answer = TypeVar("Answer")


class NetworkError(DataError):
    """The network failed too often in a row."""


class Patience:
    """Waits after an error that may pass, longer each time, and says so; gives up in the end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._failures = 0

    def succeeded(self) -> None:
        self._failures = 0

    def wait(self, error: Exception) -> None:
        """Raises `error` where it will not pass, and NetworkError after `ATTEMPTS` failures in a row."""
        if not is_passing(error):
            raise error
        self._failures += 1
        if self._failures == ATTEMPTS:
            raise NetworkError(f"{self._name}: {ATTEMPTS} attempts failed, the last one with {told(error)}") from error
        seconds = min(2 ** (self._failures - 1), LONGEST_WAIT)
        print(
            f"warning: {self._name}: {told(error)}; attempt {self._failures + 1} of {ATTEMPTS} in {seconds} s",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(seconds)


def patiently(name: str, ask: Callable[[], Answer]) -> Answer:
    """The answer of a function that may have to be asked more than once. Raises as `Patience.wait` does."""
    patience = Patience(name)
    while True:
        try:
            return ask()
        except Exception as error:
            patience.wait(error)


class Stream:
    """A streamed dataset that can be read from any place where it was left.

    Attributes:
        state: where it is, after the row that was read last; JSON. None before the first.
    """

    def __init__(self, name: str, dataset: Any) -> None:
        self._name, self._dataset = name, dataset
        self.state: dict[str, Any] | None = None

    def rows(self, start: int, state: dict[str, Any] | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Numbers, from 1, and contents of the rows after the first `start`, whose reading ended in `state`.

        Without a state, because they were not read as a stream, those first rows are read again.

        Raises:
            NetworkError: the network failed too often.
            DataError: the dataset is damaged, or cannot be taken up from that state.
        """
        patience, number = Patience(self._name), 0 if state is None else start
        if state is not None and not _fits(state, self._dataset.state_dict()):
            raise DataError(f"{self._name}: cannot be read beyond row {start}: its state is none of this dataset")
        self.state = state
        while True:
            try:
                if self.state is not None:
                    self._dataset.load_state_dict(self.state)
                for row in self._dataset:
                    self.state = self._dataset.state_dict()
                    number += 1
                    patience.succeeded()
                    if number > start:
                        yield number, row
                return
            except Exception as error:
                try:
                    patience.wait(error)
                except DataError:
                    raise
                except Exception as lasting:
                    raise DataError(
                        f"{self._name}: cannot be read beyond row {number} ({told(lasting)}); look at the dataset"
                    ) from lasting


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later: a connection that failed, or an answer that says so."""
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or one.__context__
    for one in chain:
        if type(one).__name__ == "OfflineModeIsEnabled":
            return False
        status = getattr(getattr(one, "response", None), "status_code", None) or getattr(one, "status", None)
        if isinstance(status, int):
            return status in PASSING or status >= 500
    return any(_is_of_network(one) for one in chain)


def _fits(state: Any, fresh: Any) -> bool:
    """Whether a state has the form of a fresh one: `datasets` ignores some of those that do not."""
    if isinstance(fresh, dict):
        keys = isinstance(state, dict) and state.keys() == fresh.keys()
        return keys and all(_fits(state[key], fresh[key]) for key in fresh)
    if fresh is None:
        return state is None or isinstance(state, dict)
    return type(state) is type(fresh) and (state >= 0 if isinstance(fresh, int) else state == fresh)


def told(error: BaseException) -> str:
    """The first line of an error, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_of_network(error: BaseException) -> bool:
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or not libraries.isdisjoint(NETWORK_LIBRARIES)
