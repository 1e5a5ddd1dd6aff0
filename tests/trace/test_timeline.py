"""``python -m pcsc_safe run --timeline`` draws what happened, and shows no secret."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, Union
from xml.etree import ElementTree

import pytest
from browser import browser
from forking import ChildFailedError, in_program
from interrupts import signalled_while_it_starts
from places import EXAMPLES

from pcsc_safe._trace import captions, events, records, timeline, watch
from pcsc_safe._trace.history import History
from pcsc_safe._trace.records import Event, Span
from pcsc_safe.testing import VirtualPcsc

__all__ = ["browser"]

SVG = "{http://www.w3.org/2000/svg}"
RUN = [sys.executable, "-m", "pcsc_safe", "run"]
EXACT = 0.02  # px; x and width are rounded
LEAST = 1  # px; anything thinner is drawn with this width, so its end may be off by it


class Bar(NamedTuple):
    """A rectangle over time."""

    kind: str
    start: float
    end: float
    top: float
    bottom: float
    title: str


class Lane(NamedTuple):
    """A process in the drawing."""

    pid: int
    program: str
    bars: list[Bar]

    def of(self, kind: str) -> list[Bar]:
        """The bars of a kind, sorted by time."""
        return sorted((bar for bar in self.bars if kind in bar.kind.split()), key=lambda bar: bar.start)

    def one(self, kind: str) -> Bar:
        """The only one of a kind."""
        (bar,) = self.of(kind)
        return bar


class Arrow(NamedTuple):
    """An arrow between processes."""

    kind: str
    source: int
    target: int
    x: float


class Drawing:
    """What is visible in a drawing."""

    def __init__(self, svg: str) -> None:
        root = ElementTree.fromstring(svg)
        labels = [
            [text.text or "" for text in label.iter(f"{SVG}text")] for label in root.findall(".//*[@id='labels']/*")
        ]
        lanes = root.findall(f".//{SVG}g[@class='lane']")
        self.lanes = {}
        for (process, program), lane in zip(labels, lanes):
            pid = int(process.split()[1])
            assert lane.get("id", "").startswith(f"lane-{pid}-")
            self.lanes[pid] = Lane(pid, program, [bar(rectangle) for rectangle in lane.iter(f"{SVG}rect")])
        assert len(self.lanes) == len(labels) == len(lanes)
        self.arrows = [arrow(each) for each in root.findall(".//*[@id='plot']/*") if "arrow" in each.get("class", "")]
        self.text = " ".join(root.itertext())

    def arrow_to(self, lane: Lane) -> Arrow:
        """The only arrow that ends there."""
        (found,) = [each for each in self.arrows if each.target == lane.pid]
        return found


def bar(rectangle: ElementTree.Element) -> Bar:
    x, y, width, height = (float(rectangle.get(name, "")) for name in ("x", "y", "width", "height"))
    return Bar(rectangle.get("class", ""), x, x + width, y, y + height, rectangle.findtext(f"{SVG}title") or "")


def arrow(group: ElementTree.Element) -> Arrow:
    pids = re.search(r"from process (\d+) to (\d+)", group.findtext(f"{SVG}title") or "")
    place = re.match(r"translate\(([-\d.]+) 0\)", group.get("transform", ""))
    assert pids is not None
    assert place is not None
    return Arrow(group.get("class", "").partition(" ")[2], int(pids[1]), int(pids[2]), float(place[1]))


class Ran(NamedTuple):
    """A program that was recorded."""

    status: int
    said: Any
    err: str
    file: Path
    drawing: Drawing


def record(
    stack: VirtualPcsc,
    directory: Path,
    program: str,
    *options: str,
    suffix: str = ".svg",
    arguments: tuple[str, ...] = (),
) -> Ran:
    """Run a program that prints JSON, and parse its drawing."""
    script, file = directory / "program.py", directory / f"drawing{suffix}"
    script.write_text(PRELUDE + program)
    process = subprocess.Popen(
        [*RUN, f"--timeline={file}", *options, str(script), *arguments],
        env={**os.environ, **stack.env},
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=45)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate(timeout=5)
        raise ChildFailedError(f"it did not end:\n{out}\n{err}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert out, err
    svg = re.search("<svg .*</svg>", file.read_text("utf-8"), re.DOTALL)
    assert svg is not None
    return Ran(process.returncode, json.loads(out), err, file, Drawing(svg[0]))


def in_directory(stack: VirtualPcsc, directory: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program that records to a directory."""
    return subprocess.run(
        [sys.executable, "-c", f"import pcsc_safe; pcsc_safe.install()\n{program}"],
        env={**os.environ, **stack.env, "PCSC_SAFE_REPORT": str(directory)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


PRELUDE = """
import json, os, signal, sys, threading
from smartcard.scard import *

def ok(result):
    hresult, *more = [result] if isinstance(result, int) else result
    assert hresult == SCARD_S_SUCCESS, SCardGetErrorMessage(hresult)
    return more[0] if more else None

def establish():
    return ok(SCardEstablishContext(SCARD_SCOPE_SYSTEM))

def connect(context, number=0, mode=SCARD_SHARE_SHARED):
    return ok(SCardConnect(context, ok(SCardListReaders(context, []))[number], mode, SCARD_PROTOCOL_ANY))

def exchange(card, times):
    for _ in range(times):
        ok(SCardTransmit(card, SCARD_PCI_T1, [0x80, 1, 0, 0, 3, 1, 2, 3]))

def child(function, fork=os.fork):
    # Waited for, so that nothing happens at once that is to be told apart.
    pid = fork()
    if not pid:
        signal.alarm(30)
        try:
            function()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return pid
"""
FAMILY = """
import ctypes, subprocess
SECRET = '31415926'
if len(sys.argv) > 1:
    exchange(connect(establish()), 1)
    sys.exit()

context = establish()
card = connect(context)
ok(SCardBeginTransaction(card))
exchange(card, 3)
ok(SCardEndTransaction(card, SCARD_LEAVE_CARD))

def reconnects():
    ok(SCardReconnect(card, SCARD_SHARE_SHARED, SCARD_PROTOCOL_ANY, SCARD_LEAVE_CARD))
    exchange(card, 2)

def is_killed():
    mine = connect(establish(), 1, SCARD_SHARE_EXCLUSIVE)
    ok(SCardBeginTransaction(mine))
    exchange(mine, 4)
    os.kill(os.getpid(), signal.SIGKILL)

def asks():
    ok(SCardListReaders(context, []))

def thread():
    mine = establish()
    SCardDisconnect(connect(mine), SCARD_LEAVE_CARD)
    barrier.wait(20)
    ok(SCardReleaseContext(mine))

pids = [child(reconnects), child(is_killed), child(asks, ctypes.PyDLL(None).fork), child(lambda: None)]
process = subprocess.Popen([sys.executable, __file__, SECRET])
process.wait()
barrier = threading.Barrier(3)
threads = [threading.Thread(target=thread) for _ in range(3)]
for each in threads:
    each.start()
for each in threads:
    each.join()
states = ok(SCardGetStatusChange(context, 0, [(ok(SCardListReaders(context, []))[1], SCARD_STATE_UNAWARE)]))
SCardGetStatusChange(context, 30, [(states[0][0], states[0][1])])
ok(SCardDisconnect(card, SCARD_LEAVE_CARD))
ok(SCardReleaseContext(context))
print(json.dumps([os.getpid(), *pids, process.pid]), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.fixture(scope="module")
def family(shared_stack: VirtualPcsc, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A program that does everything that needs no settings, recorded once."""
    return record(shared_stack, tmp_path_factory.mktemp("family"), FAMILY, "--report", suffix=".html")


def members(family: Ran) -> list[Lane]:
    return [family.drawing.lanes[pid] for pid in family.said]


def test_the_program_ends_as_ever(family: Ran) -> None:
    """The exit status is the program's (here a signal's); a report can be written as well."""
    assert family.status == -signal.SIGTERM
    assert "pcsc_safe: forked processes that used PC/SC: 3, contexts re-established: 2" in family.err


def test_lanes_are_processes(family: Ran) -> None:
    """Each process has a lane, a parent above its children, in the order of their start; arrows join them."""
    parent, *children = members(family)
    assert list(family.drawing.lanes) == family.said
    assert {lane.program for lane in (parent, *children)} == {"python program.py", "python program.py (C fork)"}
    kinds = [family.drawing.arrow_to(lane).kind for lane in children]
    assert kinds == ["fork", "fork", "C-fork", "fork", "start"]
    for lane in children:
        to = family.drawing.arrow_to(lane)
        assert to.source == parent.pid
        assert to.x == pytest.approx(min(bar.start for bar in lane.of("life")), abs=EXACT)
    lives = [lane.of("life") for lane in members(family)]
    assert all(top[-1].bottom < below[0].top for top, below in zip(lives, lives[1:]))
    for lane, life in zip(members(family), lives):
        for each in lane.bars:
            assert life[0].start - EXACT <= each.start
            assert each.end <= life[-1].end + LEAST
            assert life[0].top <= each.top < each.bottom <= life[0].bottom


def test_the_owners_session(family: Ran) -> None:
    """The owner's context, card, transaction, exchanges and wait are drawn one inside the other."""
    parent = members(family)[0]
    session, card = parent.of("own")[0], parent.of("card")[0]
    assert re.match(r"context established by thread \d+, established at program.py:\d+, until released", session.title)
    assert f"thread {parent.pid}," in session.title
    assert "shared, 3 exchanges, 1 transaction, " in card.title
    begun, wait = parent.one("begun"), parent.one("wait")
    assert begun.title.startswith("1 transaction, ")
    assert sum(int(each.title.split()[0]) for each in parent.of("apdu")) == 3
    assert session.start <= card.start <= begun.start <= parent.of("apdu")[0].start < begun.end < wait.start
    assert wait.end <= card.end <= session.end
    assert wait.title.startswith("1 wait for events, ")


def test_a_child_that_has_a_session_of_its_own(family: Ran) -> None:
    """What a child inherited is hatched until the child has its own context and has reconnected its card."""
    child = members(family)[1]
    inherited, own = child.one("inherited"), child.one("own")
    assert f"context inherited from process {family.said[0]}, established at program.py" in inherited.title
    assert own.title.startswith("context re-established by thread")
    assert inherited.start == child.of("life")[0].start
    assert inherited.end == pytest.approx(own.start, abs=LEAST)
    assert child.of("card-inherited")[0].start == inherited.start
    card = child.one("card")
    assert card.start > own.start
    assert "2 exchanges, 0 transactions" in card.title
    assert own.end == pytest.approx(card.end, abs=LEAST)


def test_a_killed_child_keeps_what_it_told(family: Ran) -> None:
    """A child's record is complete up to SIGKILL; its transaction lasts until the process ends."""
    killed = members(family)[2]
    assert len(killed.of("inherited")) == 1
    own, card, begun = killed.one("own"), killed.one("card"), killed.one("begun")
    assert card.kind == "card exclusive"
    assert "4 exchanges, 1 transaction" in card.title
    assert begun.end == pytest.approx(own.end, abs=LEAST)
    assert "until the process ended" in own.title


def test_a_fork_that_ran_no_hook(family: Ran) -> None:
    """A child of a fork that ran no hook appears with its first use of PC/SC, and is labelled "C fork"."""
    child = members(family)[3]
    assert child.program == "python program.py (C fork)"
    assert "forked by C code" in child.of("life")[0].title
    assert len(child.of("own")) == 1


def test_an_idle_child(family: Ran) -> None:
    """A child that uses nothing of what it inherited appears, too."""
    child = members(family)[4]
    assert [bar.kind for bar in child.bars if "life" not in bar.kind] == ["inherited", "card-inherited shared"]


def test_a_python_that_was_started(family: Ran) -> None:
    """A Python that was started by exec has inherited nothing, and its arguments are not shown."""
    started = members(family)[5]
    assert not started.of("inherited")
    assert "1 exchange, " in started.one("card").title
    assert "31415926" not in family.file.read_text()


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("/usr/bin/python3.12 -uX dev -Wignore /srv/app.py --pin 1234", "python3.12 app.py"),
        ("python -Im celery.bin 1234", "python -m celery.bin"),
        ("python -mvenv 1234", "python -m venv"),
        ("python -uc pin=1234", "python -c"),
        ("python -cpin=1234", "python -c"),
        ("python - 1234", "python -"),
        ("python --check-hash-based-pycs 1234 app.py", "python"),
        ("python -z 1234", "python"),
        ("python", "python"),
        ("python -c 1234 --multiprocessing-fork", "python (multiprocessing)"),
        ("/usr/bin/uwsgi --set-ph pin=1234 --wsgi-file app.py", "uwsgi"),
        ("uwsgi_python3 -m 1234", "uwsgi_python3"),
    ],
)
def test_no_argument_is_recorded(command: str, shown: str) -> None:
    """A program's name is recorded, never the argument of an option; a program that embeds Python has other options."""
    assert events._program(command.split()) == shown


@pytest.mark.parametrize(
    ("ns", "words"),
    [(999_600, "1000 µs"), (1.234e6, "1.23 ms"), (999.4e6, "999 ms"), (999.6e6, "1000 ms"), (1234e9, "1234 s")],
)
def test_durations(ns: float, words: str) -> None:
    """A duration has a unit, and no exponent."""
    assert captions.duration(ns) == words


def test_threads_have_rows(family: Ran) -> None:
    """Contexts that exist at the same time have rows of their own, each with the thread that established it."""
    parent = members(family)[0]
    sessions = parent.of("own")
    assert len(sessions) == 4
    assert len({bar.top for bar in sessions}) == 4
    threads = [re.search(r"by thread (\d+)", bar.title) for bar in sessions]
    assert len({thread[1] for thread in threads if thread}) == 4


DAEMON = """
import pcsc_safe
card = connect(establish(), 0, SCARD_SHARE_EXCLUSIVE)
exchange(card, 1)
pids = [os.getpid()]
with pcsc_safe.handover():
    pid = os.fork()
    if pid:
        os._exit(3)
    os.setsid()
    pids.append(os.getpid())
    pid = os.fork()
    if pid:
        os._exit(0)
    pids.append(os.getpid())
signal.alarm(30)
keep = {1, 2, *pcsc_safe.files_to_preserve()}
for number in set(range(64)) - keep:
    try:
        os.close(number)
    except OSError:
        pass
exchange(card, 2)
if os.getuid() == 0:
    os.chroot('/proc/self/fdinfo')
    os.setuid(65534)
ok(SCardDisconnect(card, SCARD_LEAVE_CARD))
print(json.dumps(pids), flush=True)
"""


def test_a_handover_to_a_daemon(shared_stack: VirtualPcsc, tmp_path: Path) -> None:
    """The session moves from lane to lane, with arrows, and the daemon is recorded until it ends.

    This also works if the daemon has closed its descriptors, and has changed its root directory and its user.
    """
    ran = record(shared_stack, tmp_path, DAEMON)
    assert ran.status == 3
    first, middle, daemon = (ran.drawing.lanes[pid] for pid in ran.said)
    assert [(arrow.kind, arrow.source, arrow.target) for arrow in ran.drawing.arrows] == [
        ("handover", first.pid, middle.pid),
        ("handover", middle.pid, daemon.pid),
    ]
    for giver, taker in ((first, middle), (middle, daemon)):
        assert giver.of("own")[-1].end == pytest.approx(taker.one("own").start, abs=LEAST)
        assert giver.one("inherited").start == pytest.approx(taker.one("own").start, abs=EXACT)
        assert f"handed over to process {taker.pid}" in giver.one("own").title
        assert not taker.of("lost")
    assert not daemon.of("inherited")
    assert "exclusive, 2 exchanges" in daemon.one("card").title
    assert daemon.one("card").end < daemon.one("own").end


SHARING = """
context = establish()
card = connect(context, 0, SCARD_SHARE_EXCLUSIVE)

def work():
    for _ in range(3):
        ok(SCardBeginTransaction(card))
        exchange(card, 2)
        ok(SCardEndTransaction(card, SCARD_LEAVE_CARD))

pids = [child(work), child(work)]
ok(SCardReleaseContext(context))
print(json.dumps([os.getpid(), *pids]))
"""


def test_a_session_that_is_shared(shared_stack: VirtualPcsc, tmp_path: Path) -> None:
    """The broker has a lane; the session belongs to the parent and the children, with an arrow to each."""
    ran = record(shared_stack, tmp_path, SHARING, "--broker", "always", "--policy", "share")
    parent, *children = (ran.drawing.lanes[pid] for pid in ran.said)
    (broker,) = [lane for pid, lane in ran.drawing.lanes.items() if pid not in ran.said]
    assert broker.program == "PC/SC broker"
    assert len(broker.bars) == 1
    assert f"through broker {broker.pid}" in parent.one("own").title
    shared = [(arrow.kind, arrow.source, arrow.target) for arrow in ran.drawing.arrows if arrow.target != broker.pid]
    assert shared == [("share", parent.pid, child.pid) for child in children]
    for child in children:
        own = child.one("own")
        assert "through" in own.kind.split()
        assert not child.of("inherited")
        # Its end is when the watcher has seen it, which may be late on a busy machine.
        assert parent.one("own").start < own.start < min(own.end, parent.one("own").end)
        assert "exclusive, 6 exchanges, 3 transactions" in child.one("card").title


LIVES_ON = """
establish()
read_end, write_end = os.pipe()
if os.fork() == 0:
    signal.alarm(30)
    os.close(1)
    os.write(write_end, b'.')
    signal.pause()
os.read(read_end, 1)
print(json.dumps(os.getpid()), flush=True)
"""


def test_a_process_that_lives_on(shared_stack: VirtualPcsc, tmp_path: Path) -> None:
    """``run`` waits for a process that lives on, and says so; after Ctrl-C the drawing calls its end unknown."""
    script, file = tmp_path / "program.py", tmp_path / "drawing.svg"
    script.write_text(PRELUDE + LIVES_ON)
    with subprocess.Popen(
        [*RUN, "--timeline", str(file), str(script)],
        env={**os.environ, **shared_stack.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            assert "still runs: recording continues until it ends or you press Ctrl-C" in line
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(20) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    lane = list(Drawing(file.read_text()).lanes.values())[-1]
    assert f"process {lane.pid} still runs" in line
    assert len(lane.of("fading")) == 1
    assert "its end is not known" in lane.of("life")[0].title


WAITS = """
import ctypes, time
context = establish()
states = ok(SCardGetStatusChange(context, 0, [(ok(SCardListReaders(context, []))[0], SCARD_STATE_UNAWARE)]))
known = [(name, state & ~SCARD_STATE_CHANGED) for name, state, _ in states]
pid = child(lambda: SCardGetStatusChange(context, 20, known), ctypes.PyDLL(None).fork)
long = threading.Thread(target=SCardGetStatusChange, args=(context, 300, known))
long.start()
time.sleep(0.1)
SCardGetStatusChange(context, 20, known)
long.join()
print(json.dumps([os.getpid(), pid]))
"""


def test_waits_of_processes_and_threads(shared_stack: VirtualPcsc, tmp_path: Path) -> None:
    """A wait is in the record of its process, also as the first call after a C fork; each thread's wait has its end."""
    done = in_directory(shared_stack, tmp_path, PRELUDE + WAITS)
    assert done.returncode == 0, done.stderr
    spans = [each for each in records.read(tmp_path) if isinstance(each, Span) and each.activity == "wait"]
    parent, child = (
        [each for each in spans if int(each.process.split("-")[0]) == pid] for pid in json.loads(done.stdout)
    )
    assert (len(parent), len(child)) == (2, 1)
    assert parent[0].end > parent[1].end > parent[1].start > parent[0].start
    assert child[0].end > child[0].start


INTERRUPTED = """
from smartcard import scard
from pcsc_safe._trace import events
def handler(*arguments):
    raise RuntimeError
def interrupted(*arguments):
    signal.raise_signal(signal.SIGUSR1)
signal.signal(signal.SIGUSR1, handler)
fallocate, os.posix_fallocate = os.posix_fallocate, interrupted
if os.fork() == 0:
    os.posix_fallocate = fallocate
    events.record("of the child")
    child(lambda: events.record("of the grandchild"))
    os._exit(0)
os.wait()
"""


def test_a_signal_handler_raises_while_a_record_begins(shared_stack: VirtualPcsc, tmp_path: Path) -> None:
    """What a child does never goes to its parent's record; the child's children have records of their own."""
    done = in_directory(shared_stack, tmp_path, PRELUDE + INTERRUPTED)
    assert "RuntimeError" in done.stderr
    told = records.events(records.read(tmp_path))
    parent = next(each.process for each in told if each.fields.get("how") == "start")
    assert [each.kind for each in told if each.process == parent] == ["process"]
    (grandchild,) = {each.process for each in told} - {parent}
    assert [(each.kind, each.fields.get("parent")) for each in told if each.process == grandchild] == [
        ("process", parent),
        ("of the grandchild", None),
    ]


def test_where_no_record_can_be_written(shared_stack: VirtualPcsc, tmp_path: Path) -> None:
    """If no record can be written, the program runs as usual."""
    code = PRELUDE + "exchange(connect(establish()), 2); child(establish); print('done')"
    done = in_directory(shared_stack, tmp_path / "no" / "such", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


EXAMPLE = EXAMPLES / "family.py"


@pytest.mark.skipif(not EXAMPLE.exists(), reason="examples/ is not part of this installation")
def test_the_example_of_the_documentation(shared_stack: VirtualPcsc, tmp_path: Path) -> None:
    """examples/family.py does what it says, and its drawing is like docs/timeline.svg."""
    file = tmp_path / "drawing.svg"
    command = [*RUN, "--timeline", str(file), str(EXAMPLE)]
    env = {**os.environ, **shared_stack.env}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=45, check=False)
    assert (done.returncode, done.stdout) == (0, "all done\n"), done.stderr
    shown = Drawing((EXAMPLE.parent.parent / "docs" / "timeline.svg").read_text("utf-8"))
    found = Drawing(file.read_text("utf-8"))
    for drawing in (shown, found):
        assert sorted(arrow.kind for arrow in drawing.arrows) == ["fork", "fork", "handover"]
        parent, *workers, successor = drawing.lanes.values()
        for lane in (parent, *workers, successor):
            assert {"apdu", "begun", "card shared", "own"} <= {bar.kind for bar in lane.bars}
        assert [len(lane.of("inherited")) for lane in (parent, *workers, successor)] == [1, 1, 1, 0]


# Drawings of made-up histories.


NASTY = "<script>alert(1)</script> ]]> & \" ' \x00\x1b \ud800 é 卡 --> <!--drawing-->"


def made_up(processes: int, seconds: float, contexts: int, exchanges: int, reader: str = "Reader") -> History:
    """A server with workers."""
    dice, length, base, ends = random.Random(1), int(seconds * 1e9), 10**12, {"1-0": int(seconds * 1e9) + 10**12}
    told: list[Union[Event, Span]] = []

    def tell(process: str, time: int, kind: str, **fields: Any) -> None:
        told.append(Event(base + time, process, kind, 1, fields))

    tell("1-0", 0, "process", ppid=0, parent="", how="start", program=f"python {reader}", space=1)
    for pid in range(2, processes + 1):
        name, start, end = f"{pid}-0", dice.randrange(length // 4), dice.randrange(length // 2, length)
        tell(name, start, "process", ppid=1, parent="1-0", how="fork", program="", space=1)
        ends[name] = base + end
        for number in range(contexts):
            since, key = start + (end - start) * number // contexts, f"{pid}-{number}"
            until = since + (end - start) // contexts * 7 // 8
            tell(name, since, "established", context=key, at=f"{reader}:1", through=0)
            tell(name, since + 1, "connected", card=f"{key}-card", context=key, reader=reader, mode="shared")
            for count in range(exchanges):
                time = base + since + 2 + (until - since) * count // exchanges
                told.append(Span(name, "apdu", f"{key}-card", time, time + 60_000, 1))
            tell(name, until, "released", key=key)
    told.sort(key=lambda each: each.start if isinstance(each, Span) else each.time)
    return History(told, ends, {})


@pytest.mark.parametrize("suffix", [".svg", ".html"])
def test_names_are_text(suffix: str) -> None:
    """Names of readers and programs are escaped: they can't become part of the page."""
    text = timeline.draw(made_up(2, 1, 1, 1, NASTY), suffix)
    clean = timeline.draw(made_up(2, 1, 1, 1), suffix)
    assert text.count("<script") == clean.count("<script")
    assert text.encode("utf-8")
    svg = re.search("<svg .*</svg>", text, re.DOTALL)
    assert svg is not None
    found = Drawing(svg[0])
    assert "<script>alert(1)</script> ]]> & \" ' \ufffd\ufffd \ufffd é 卡" in found.lanes[2].one("card").title


@pytest.mark.parametrize(
    ("processes", "seconds", "contexts", "exchanges"),
    [(2, 0.01, 1, 3), (30, 600, 3, 400), (30, 600, 1000, 1), (700, 600, 2, 2)],
)
def test_no_drawing_is_big(processes: int, seconds: float, contexts: int, exchanges: int) -> None:
    """A drawing stays below 2 MB for hundreds of processes and for 10 minutes; bars that are merged are counted."""
    svg = timeline.draw(made_up(processes, seconds, contexts, exchanges), ".svg")
    assert len(svg.encode()) < 2_000_000
    found = Drawing(svg)
    assert len(found.lanes) == min(processes, 500)
    assert ("200 more processes are not drawn" in found.text) == (processes == 700)
    if contexts == 1000:
        counts = [int(bar.title.split()[0]) for bar in found.lanes[7].of("own") if " contexts, " in bar.title]
        assert sum(counts) == 1000
    else:
        counted = [re.search(r"(\d+) exchanges", bar.title) for bar in found.lanes[2].of("card")]
        assert [int(match[1]) for match in counted if match] == [exchanges] * contexts


def test_what_is_missing_is_said() -> None:
    """Processes without PC/SC are counted; what can't be seen is named; a truncated record is reported."""
    told = [
        Event(1, "1-0", "process", 1, {"ppid": 0, "parent": "", "how": "start", "program": "python", "space": 1}),
        Event(2, "2-0", "process", 2, {"ppid": 1, "parent": "1-0", "how": "fork", "program": "", "space": 1}),
        Event(3, "1-0", "established", 1, {"context": "a", "at": "a.py:1", "through": 0}),
        Event(4, "1-0", "recovered", 1, {"contexts": 2}),
        Event(5, "1-0", "incomplete", 1, {}),
        Event(6, "7-0", "established", 7, {"context": "b"}),
    ]
    found = Drawing(timeline.draw(History(told, {"1-0": 10}, {"2-0": 5}), ".svg"))
    assert list(found.lanes) == [1]
    for words in ("1 more did not use PC/SC", "The record of process 1 is incomplete", "Not drawn are processes"):
        assert words in found.text
    assert "recovered, contexts 2" in found.text


def test_an_empty_history() -> None:
    """If a program is killed before it could record anything, it still has a drawing."""
    assert Drawing(timeline.draw(History([], {}, {}), ".svg")).lanes == {}


def test_the_page_asks_for_nothing(family: Ran) -> None:
    """The page has no address but SVG's namespace, and its content security policy forbids any request."""
    page = family.file.read_text()
    assert set(re.findall(r"https?://[^\"' ]*", page)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page
    assert not re.search(r"\b(src|href|@import|fetch|XMLHttpRequest)\b *[=(]", page.replace('href="data:,"', ""))


STEPS = """
<script>
const seen = Object.fromEntries(shapes.map(({e}, i) => [i, +e.getAttribute("width")]));
doing.closer(); doing.closer();
const wider = shapes.filter(({e, w}, i) => w > 2 && Math.abs(+e.getAttribute("width") / seen[i] - 4) < 0.01).length;
const wide = shapes.filter(({w}) => w > 2).length;
doing.all();
const same = shapes.every(({e, x, w}) => Math.abs(e.getAttribute("x") - x) < 0.1);
const target = shapes[1].e, box = target.getBoundingClientRect();
target.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: box.x, clientY: box.y}));
new Image().src = "http://127.0.0.1:9/control";
document.body.append(Object.assign(document.createElement("pre"),
  {id: "found", textContent: JSON.stringify({wider, wide, same, tip: tip.textContent, shown: tip.style.display})}));
</script>
"""


def test_the_page_in_a_browser(family: Ran, browser: Any, tmp_path: Path) -> None:
    """Chromium shows the page without an error; it can be zoomed, and shows what is under the pointer.

    The page forbids all requests, so a request would be an error.  The test adds one, to see that it is.
    """
    page = tmp_path / "page.html"
    page.write_text(family.file.read_text().replace("</body>", f"{STEPS}</body>"))
    dom, console = browser(page)
    assert len(console) == 1
    assert "http://127.0.0.1:9/control' violates the following Content Security Policy directive" in console[0]
    found = re.search('<pre id="found">(.*)</pre>', dom)
    assert found is not None, dom
    result = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert result["wide"] == result["wider"] > 3
    assert result["same"] is True
    assert result["shown"] == "block"
    assert "context" in result["tip"]
    for lane in members(family):
        assert dom.count(f'id="lane-{lane.pid}-') == 1


def end_while_it_starts() -> None:
    """Program: get SIGTERM when the program runs, and subprocess hasn't returned; print how both ended."""
    started = signalled_while_it_starts(watch)
    print(json.dumps([watch.run(["sleep", "60"], os.environ), started[0].poll()]))


def test_a_signal_while_the_program_starts() -> None:
    """A signal ends the program also if it arrives between its start and the moment from which its process is known."""
    done = in_program(end_while_it_starts)
    assert json.loads(done.stdout) == [-signal.SIGTERM, -signal.SIGTERM], done.stderr
