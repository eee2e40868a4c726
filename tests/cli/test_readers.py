"""Items loaded ahead by other processes: order, bounds, deaths, and no process left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import psutil
import pytest

from madad.cli._readers import read_ahead

ROOT = Path(__file__).parents[2]
SECONDS = 120  # that nothing may take
# What is loaded must be importable in a reader, as a test's own functions are not.
DIES = partial(signal.raise_signal, signal.SIGKILL)


def readers_left():
    """Children of this process, but for joblib's workers, which wait for more after other tests."""
    return [child for child in multiprocessing.active_children() if type(child).__name__ != "LokyProcess"]


def wait_until(is_so):
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def outcomes(loads, n_readers):
    """What each load gave, or its error."""
    found = []
    with read_ahead(loads, n_readers) as answers:
        for answer in answers:
            try:
                found.append(answer())
            except (ValueError, RuntimeError) as error:
                found.append(error)
    assert readers_left() == []
    return found


HARMLESS = [*(partial(pow, 2, i) for i in range(4)), partial(int, "x"), os.getpid, os.getpid]
DEADLY = [DIES, partial(pow, 3, 3), partial(os._exit, 7), partial(pow, 3, 4)]


@pytest.fixture(scope="module")
def by_two():
    """What two readers made of the harmless and then of the deadly ones."""
    return outcomes(HARMLESS + DEADLY, 2)


@pytest.mark.parametrize("n_readers", [0, 2])
def test_items_and_errors_come_in_order(n_readers, by_two):
    found = by_two if n_readers else outcomes(HARMLESS, 0)
    *powers, error, one, two = found[: len(HARMLESS)]
    assert powers == [1, 2, 4, 8]
    assert isinstance(error, ValueError) and str(error) == "invalid literal for int() with base 10: 'x'"
    assert (one == os.getpid()) == (n_readers == 0) and (one == two) == (n_readers < 2)
    if n_readers:
        assert "in _attempt" in "".join(traceback.format_exception(error))  # where it was raised


def test_nothing_to_load_needs_no_reader():
    assert outcomes([], 2) == []


def test_a_dead_reader_costs_what_it_was_at(by_two):
    died, one, left, another = by_two[len(HARMLESS) :]
    assert [one, another] == [27, 81]
    for error, code in ((died, -signal.SIGKILL), (left, 7)):
        assert isinstance(error, RuntimeError) and f"got exit code {code}." in str(error)
        assert "memory" in str(error) and "--readers 0" in str(error)


def test_no_more_is_loaded_than_there_are_readers_and_an_error_here_ends_them(tmp_path):
    start = time.monotonic()
    loads = [partial(Path.touch, tmp_path / str(i)) for i in range(6)]
    with pytest.raises(KeyError), read_ahead([*loads, partial(time.sleep, 2 * SECONDS)], 2) as answers:
        for n_answered in range(6):
            answer, ahead = next(answers), min(n_answered + 2, 6)
            wait_until(lambda expected=ahead: len(os.listdir(tmp_path)) >= expected)
            assert sorted(os.listdir(tmp_path)) == [str(i) for i in range(ahead)]
            answer()
        raise KeyError  # in the middle of the last load
    assert readers_left() == [] and time.monotonic() - start < SECONDS


SCRIPT = """
import os, sys, time
from functools import partial
from madad.cli._readers import read_ahead

def ask(n_readers):
    loads = [*[os.getpid] * n_readers, *[partial(time.sleep, 600)] * n_readers]
    with read_ahead(loads, n_readers) as answers:
        print(os.getpid(), *(next(answers)() for _ in range(n_readers)), flush=True)
        next(answers)()

if sys.argv[1:] == ["unguarded"]:
    ask(1)
elif __name__ == "__main__":
    for name, n_readers in (("SIGINT", 2), ("SIGTERM", 1), ("SIGKILL", 1)):
        if os.fork() == 0:  # spares each the import
            os.setsid()
            sys.stdout, sys.stderr = (open(f"{sys.argv[1]}/{name}.{end}", "w") for end in ("out", "err"))
            ask(n_readers)
            sys.exit()
    for _ in range(3):
        os.wait()
"""


def start(tmp_path, word):
    (tmp_path / "script.py").write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, tmp_path / "script.py", word],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def askers(tmp_path_factory):
    """The folder of three processes that each wait for readers, and what they print."""
    folder = tmp_path_factory.mktemp("askers")
    running = start(folder, str(folder))
    yield folder
    running.communicate(timeout=SECONDS)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_readers_end_with_the_process_that_asks(askers, name):
    out = askers / f"{name}.out"
    wait_until(lambda: out.exists() and out.read_text().endswith("\n"))
    asker, *readers = [psutil.Process(int(pid)) for pid in out.read_text().split()]
    assert len(readers) == (2 if name == "SIGINT" else 1)
    if name == "SIGINT":  # as Ctrl-C, to all of them
        os.killpg(asker.pid, signal.SIGINT)
    else:
        asker.send_signal(getattr(signal, name))
    assert psutil.wait_procs([asker, *readers], timeout=SECONDS)[1] == []
    # of the one that asks alone
    assert (askers / f"{name}.err").read_text().count("Traceback") == (name == "SIGINT")


def test_a_script_that_starts_itself_again_is_told(tmp_path):
    _, errors = start(tmp_path, "unguarded").communicate(timeout=SECONDS)
    assert 'if __name__ == "__main__":' in errors and "ImportError" in errors and "--readers 0" in errors
