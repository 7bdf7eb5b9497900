"""An end to work that takes too long, whatever it is doing."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from attention.selection.time_limit import TimeLimitError, time_limit


def test_work_that_waits_is_interrupted() -> None:
    with pytest.raises(TimeLimitError, match=r"more than 0\.05 s"), time_limit(0.05):
        time.sleep(60)


def test_work_that_computes_is_interrupted() -> None:
    def compute() -> None:
        while True:
            pass

    with pytest.raises(TimeLimitError), time_limit(0.05):
        compute()


def test_who_swallows_the_interruption_is_interrupted_again() -> None:
    swallowed = []

    def stubborn() -> None:
        try:
            time.sleep(60)
        except TimeLimitError as error:
            swallowed.append(error)
        time.sleep(60)

    with pytest.raises(TimeLimitError), time_limit(0.05, again_s=0.05):
        stubborn()
    assert len(swallowed) == 1


def test_nothing_is_left_behind() -> None:
    before = signal.getsignal(signal.SIGALRM)
    for seconds in (0.01, 60.0):
        try:
            with time_limit(seconds):
                time.sleep(0.1)
        except TimeLimitError:
            assert seconds == 0.01
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_error_of_the_work_stays_what_it_is() -> None:
    with pytest.raises(KeyError), time_limit(60.0):
        raise KeyError("x")


def test_on_another_thread_the_work_runs_to_its_end() -> None:
    done = []

    def work() -> None:
        with time_limit(0.01):
            time.sleep(0.05)
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
