"""A function that runs in a thread of its own, but only while its results are waited for.

``generate`` calls back for every new token; a caller wants to ask for the next one. Two threads in
lockstep turn the one into the other: exactly one of them runs at any time, so random numbers, hooks
and the model itself meet no second user. What computes much is run in the caller's thread
(``in_caller``).
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import finalize

T = TypeVar("T")


class Stopped(BaseException):
    """Ends the function's thread early; no library's ``except Exception`` stops it."""


class Handover(Generic[T]):
    """What both threads know of. The function sees this alone, so the caller's end can be freed."""

    def __init__(self, work: Callable[[Handover[T]], None]) -> None:
        self._work = work
        self._turn = threading.Semaphore(0)  # the function may run
        self._ready = threading.Semaphore(0)  # the caller may run
        self._items: list[T] = []
        self._errand: Callable[[], Any] | None = None  # for the caller's thread
        self._outcome: tuple[Any, BaseException | None] = (None, None)
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.over = False  # the function has returned or raised
        self.error: BaseException | None = None

    def emit(self, item: T) -> None:
        """Called by the function: give the caller an item, and wait until it wants the next.

        Raises: Stopped: if it wants no more.
        """
        self._items.append(item)
        self._ready.release()
        self._turn.acquire()
        self.check()

    def in_caller(self, errand: Callable[[], Any]) -> Any:
        """Called by the function: what ``errand`` returns or raises in the caller's thread.

        PyTorch keeps worker threads for each thread that computes; those of two threads get in each
        other's way where they are more than the processors.

        Raises: Stopped: if the caller wants no more.
        """
        self._errand = errand
        self._ready.release()
        self._turn.acquire()
        self.check()
        (result, error), self._outcome = self._outcome, (None, None)
        if error is not None:
            raise error
        return result

    def check(self) -> None:
        """Called by the function amid a long step.

        Raises: Stopped: if the caller wants no more.
        """
        if self._stopping:
            raise Stopped

    def take(self) -> T | None:
        """Called by the caller: the next item; None once the function is over."""
        if self.over:
            return None
        if self._thread is None:
            run = contextvars.copy_context().run
            self._thread = threading.Thread(
                target=run, args=(self._run,), name="atman live", daemon=True
            )
            self._thread.start()
        else:
            self._turn.release()
        self._ready.acquire()
        while self._errand is not None:
            errand, self._errand = self._errand, None
            try:
                self._outcome = (errand(), None)
            except BaseException as error:  # noqa: BLE001 - raised where the function waits
                self._outcome = (None, error)
            del errand
            self._turn.release()
            self._ready.acquire()
        return None if self.over else self._items.pop()

    def stop(self) -> None:
        """Called by the caller: end the function, and wait until its thread is gone."""
        self._stopping = True
        thread = self._thread
        if thread is None:
            self.over = True
        elif thread is not threading.current_thread():  # a collector may run in either
            self._turn.release()
            thread.join()

    def _run(self) -> None:
        try:
            self._work(self)
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            self.error = error
        finally:
            self.over = True
            self._ready.release()


class Lockstep(Generic[T]):
    """Iterates over what ``work`` emits.

    Args:
        work: Called once, in the other thread, with the :class:`Handover` to emit to. It must not
            refer to this object, or dropping this object would not end it.
    """

    def __init__(self, work: Callable[[Handover[T]], None]) -> None:
        self._handover = Handover(work)
        self._close = finalize(self, self._handover.stop)

    @property
    def over(self) -> bool:
        """Whether there will be no more items."""
        return self._handover.over

    def __iter__(self) -> Lockstep[T]:
        return self

    def __next__(self) -> T:
        """The next item; what the function raises is raised here."""
        try:
            item = self._handover.take()
        except BaseException:  # Ctrl-C while waiting
            self._close()
            raise
        if not self._handover.over:
            return item  # pyright: ignore[reportReturnType]
        self.close()
        raise StopIteration

    def close(self) -> None:
        """End the function, whose contexts are left; nothing happens if it is over already.

        Raises: what the function raised, once.
        """
        self._close()
        error, self._handover.error = self._handover.error, None
        if error is not None:
            raise error
