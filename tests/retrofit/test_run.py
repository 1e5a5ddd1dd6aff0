"""``python -m pcsc_safe run``: a program behaves as without it, and the report says what the program did."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, Optional

import pytest

from pcsc_safe import __main__ as cli
from pcsc_safe._core import python_path
from pcsc_safe._core.calls import CALLS
from pcsc_safe._trace import events, recorder, report
from pcsc_safe._trace.records import Event
from pcsc_safe.broker import start
from pcsc_safe.retrofit import launcher
from pcsc_safe.testing import VirtualPcsc

RUN = ["-m", "pcsc_safe", "run"]
REPORTED = "pcsc_safe: forked processes that used PC/SC: "


class Done(NamedTuple):
    """How a program ended, and its output."""

    status: int
    out: str
    err: str


def run(
    *arguments: str, cwd: Path, given: str = "", env: Optional[dict[str, str]] = None, python: str = sys.executable
) -> Done:
    done = subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
        input=given,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


WHO = """
import __main__, os, sys
main = __main__
print(sys.argv, sys.path[0], sys.path.count(sys.path[0]), sys.flags, sys.warnoptions, sys._xoptions)
print(len(sys.path), sorted(name for name in sys.modules if name.endswith('customize')))
print(__name__, main.__dict__ is globals(), sorted(vars(main)))
print([getattr(main, name, None) for name in ('__file__', '__package__', '__doc__')])
print(getattr(main.__spec__, 'name', None), getattr(main.__spec__, 'origin', None))
print(sys.stdin.read())
print('err', file=sys.stderr)
print([name for name in ('wrapt', 'smartcard', 'argparse', 'logging') if name in sys.modules])
"""
FAILS = """
import atexit
atexit.register(print, 'at exit')
def inner():
    try:
        {}['a']
    except KeyError as error:
        raise ValueError('b') from error
inner()
"""
POOL = """
import multiprocessing, pickle, sys, threading

class Thing:
    def __init__(self, value):
        self.value = value

def half(thing):
    return Thing(thing.value / 2)

if __name__ == '__main__':
    print(pickle.loads(pickle.dumps(Thing(3))).value, flush=True)
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        print(pool.apply(half, [Thing(4)]).value, type(pool.apply(half, [Thing(1)])) is Thing, flush=True)
else:
    print(__name__, flush=True)  # a pool's workers end by SIGTERM
"""
FILES = {
    "who.py": WHO,
    "package/__init__.py": "print('package')",
    "package/__main__.py": WHO,
    "package/module.py": WHO,
    "folder/__main__.py": WHO,
    "fails.py": FAILS,
    "pool.py": POOL,
    "wrong.py": "x = (\n",
    "latin.py": b"# -*- coding: latin-1 -*-\nprint(ascii('\xe9'))\n",
    "exit.py": "import sys, atexit; atexit.register(print, 'bye'); sys.exit(eval(sys.argv[1]))",
    "die.py": "import os, signal, sys; print('dying', flush=True); os.kill(os.getpid(), int(sys.argv[1]))",
    "sub.py": "import subprocess, sys; print(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)",
    "warns.py": "import warnings; warnings.warn('w', ResourceWarning); open(__file__)",
}
PROGRAMS = {
    "script": ["who.py", "a", "--report", "--policy", "x", "-m", "--", "-h"],
    "script elsewhere": ["./folder/../who.py"],
    "module": ["-m", "who", "-c", "a"],
    "module, joined": ["-mwho", "-x"],
    "package": ["-m", "package", "a"],
    "module of a package": ["-m", "package.module"],
    "folder": ["folder", "a"],
    "zip": ["program.zip", "a"],
    "code": ["-c", WHO, "a", "-c"],
    "code, joined": ["-cprint(__name__)"],
    "standard input": ["-", "a"],
    "after --": ["--", "who.py", "--"],
    "fails": ["fails.py"],
    "module fails": ["-m", "fails"],
    "code fails": ["-c", "1/0"],
    "wrong": ["wrong.py"],
    "encoding": ["latin.py"],
    "no such file": ["no-such.py"],
    "no such module": ["-m", "no_such"],
    "no module": ["-m"],
    "no main": ["-m", "json.tool.x"],
    **{f"exit {value}": ["exit.py", value] for value in ("None", "0", "3", "300", "-1", "'words'", "(1, 2)", "True")},
    "os._exit": ["-c", "import os; os._exit(7)"],
    "interrupted": ["-c", "raise KeyboardInterrupt"],
    **{f"signal {number}": ["die.py", str(int(number))] for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)},
    "child": ["sub.py", "who.py", "a"],
    "child's module": ["sub.py", "-m", "fails"],
    "isolated child": ["sub.py", "-I", "who.py"],
    "spawn": ["pool.py", "spawn"],
    "forkserver": ["pool.py", "forkserver"],
    "fork": ["pool.py", "fork"],
}


def wrote(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the programs of the table."""
    directory = tmp_path_factory.mktemp("programs")
    for name, text in FILES.items():
        wrote(directory / name, text)
    with zipfile.ZipFile(directory / "program.zip", "w") as archive:
        archive.writestr("__main__.py", WHO)
    return directory


def as_by_python(programs: Path, arguments: Sequence[str], options: Sequence[str] = (), given: str = "given") -> None:
    """A program prints the same, and ends in the same way, with python and with run."""
    with ThreadPoolExecutor() as threads:
        expected, found = threads.map(lambda way: run(*options, *way, *arguments, cwd=programs, given=given), ([], RUN))
    assert found == expected


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_notices_nothing(programs: Path, name: str) -> None:
    """stdout, stderr and the exit status are the same as with python; tracebacks have the program's frames only."""
    as_by_python(programs, PROGRAMS[name])


@pytest.mark.parametrize(
    "name", ["script", "standard input", "fails", "exit 3", "exit 'words'", "interrupted", "signal 9", "spawn"]
)
def test_nor_of_a_report(programs: Path, name: str) -> None:
    """With a report the output is the same, and the report comes last."""
    expected = run(*PROGRAMS[name], cwd=programs, given="given")
    reported = run(*RUN, "--report", *PROGRAMS[name], cwd=programs, given="given")
    said, _, report = reported.err.partition(REPORTED)
    assert reported._replace(err=said) == expected
    assert report.endswith("\n")


@pytest.mark.parametrize(
    "options",
    [
        ["-u"],
        ["-O"],
        ["-OO", "-bb", "-q", "-s"],
        ["-X", "dev", "-X", "faulthandler", "-Xutf8=1"],
        ["-W", "error::ResourceWarning", "-Wignore::SyntaxWarning"],
        pytest.param(["-P"], marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="since Python 3.11")),
    ],
    ids=" ".join,
)
def test_the_options_of_python_count(programs: Path, options: list[str]) -> None:
    """The options of the Python that runs ``-m pcsc_safe run`` apply to the program."""
    as_by_python(programs, ["who.py"], options)
    as_by_python(programs, ["warns.py"], options)


INTERRUPTED = """
import sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "pcsc_safe.retrofit.installation":
            sys.meta_path.remove(self)
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
try:
    import smartcard.scard
except KeyboardInterrupt:
    import smartcard.scard
print(smartcard.scard._scard.SCardTransmit.__module__)
"""


def test_the_first_import_is_interrupted(programs: Path) -> None:
    """If a signal handler raises while pyscard is first imported, the next import is retrofitted."""
    assert run(*RUN, "-c", INTERRUPTED, cwd=programs) == (0, "pcsc_safe.retrofit.scard\n", "")


def test_a_program_can_be_inspected(programs: Path) -> None:
    """With ``python -i`` the prompt appears once, after the program, in its main module."""
    as_by_python(programs, ["exit.py", "3"], ["-i"], "print(sys.argv, __name__)\nraise SystemExit(4)\n")


@pytest.mark.parametrize("flag", ["-E", "-I", "-S"])
def test_what_keeps_the_retrofit_out_is_refused(programs: Path, flag: str) -> None:
    """``run`` refuses to start under a Python that ignores PYTHONPATH, because the program would be unprotected."""
    home = Path(launcher.__file__).parent.parent.parent
    code = f"import sys; sys.path[:0] = {[str(home), *sys.path]!r}; from pcsc_safe import __main__ as cli; "
    done = run(flag, "-c", code + "cli.main(['run', 'who.py'])", cwd=programs)
    assert (done.status, done.out) == (2, "")
    assert "leave them out" in done.err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "name a program to run"),
        (["--report"], "name a program to run"),
        (["--timeline", "x.png", "who.py"], "--timeline x.png: name a file that ends in .html or .svg"),
        (["--timeline=/no/such/x.svg", "who.py"], "--timeline /no/such/x.svg: No such file or directory"),
        (["--policy"], "expected one argument"),
        (["--policy", "bogus", "who.py"], "--policy cannot be 'bogus'; use one of 'auto'"),
        (["--policy=share", "who.py"], "set broker='always' as well"),
        (["--guard-native=perhaps", "who.py"], "--guard-native cannot be 'perhaps'; use one of '1', 'true'"),
        (["--recover=maybe", "who.py"], "--recover cannot be 'maybe'; use one of '1', 'true'"),
        (["--no-such", "who.py"], "python -m pcsc_safe run: error: run has no option --no-such"),
        (["-z", "who.py"], "error: run has no option -z"),
        (["-u", "who.py"], "python -u -m pcsc_safe run"),
        (["-X", "dev", "who.py"], "python -X dev -m pcsc_safe run"),
        (["-uWerror", "who.py"], "python -uWerror -m pcsc_safe run"),
        (["-X"], "python -X ... -m pcsc_safe run"),
        (["-um", "who"], "python -u -m pcsc_safe run -m ..."),
        (["-E", "who.py"], "leave them out"),
        (["-uI", "who.py"], "leave them out"),
        (["-S", "who.py"], "leave them out"),
    ],
)
def test_a_wrong_call_is_refused(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong arguments run nothing; the exit status is 2, and the message gives the reason."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", *arguments])
    assert ended.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.split())


def test_options_end_where_the_program_begins() -> None:
    """As with python, everything after the program's name is an argument of the program."""
    assert launcher.split(["--policy", "raise", "--report", "x.py", "--report"]) == (
        ["--policy", "raise", "--report"],
        ["x.py", "--report"],
    )
    assert launcher.split(["--pol", "raise", "--owner=child", "-m", "x"]) == (
        ["--pol", "raise", "--owner=child"],
        ["-m", "x"],
    )
    assert launcher.split(["--timeline", "x.svg", "-m", "x"]) == (["--timeline", "x.svg"], ["-m", "x"])
    assert launcher.split(["-", "--report"]) == ([], ["-", "--report"])
    assert launcher.split(["--", "--report"]) == ([], ["--", "--report"])
    assert launcher.split(["--recover", "x.py", "--recover=0"]) == (["--recover"], ["x.py", "--recover=0"])
    assert launcher.split(["--broker-python", "-c"]) == (["--broker-python", "-c"], [])
    assert launcher.split(["--broker-python=", "x.py"]) == (["--broker-python="], ["x.py"])
    assert launcher.split(["--guard-native", "x.py", "no"]) == (["--guard-native"], ["x.py", "no"])
    assert launcher.split(["--guard-native=no", "x.py"]) == (["--guard-native=no"], ["x.py"])


def test_settings_are_given_on_by_the_environment(programs: Path) -> None:
    """Options override variables; both apply to the program and to the processes that it starts."""
    code = "import pcsc_safe; s = pcsc_safe.settings(); print(*(getattr(v, 'value', v) for v in s), s)"
    for arguments in (["-c", code], ["sub.py", "-c", code]):
        done = run(
            *RUN,
            "--policy",
            "raise",
            "--quiesce-timeout=2",
            "--recover",
            *arguments,
            cwd=programs,
            env={"PCSC_SAFE_CARDS": "reconnect"},
        )
        told = done.out.splitlines()[-1 if arguments[0] == "-c" else 0]
        assert (done.err, told[:19], "recover=True" in told) == ("", "raise reconnect 2.0", True)


# How it is loaded into a Python process.


@pytest.mark.parametrize(
    "text",
    [
        "import sys; print('theirs', __name__, sys.modules[__name__].__file__ == __file__); x = 1",
        "raise RuntimeError('theirs')",
        "import no_such_module",
    ],
)
def test_another_sitecustomize_is_still_imported(programs: Path, tmp_path: Path, text: str) -> None:
    """Python imports the same sitecustomize as without pcsc_safe, and treats its errors in the same way."""
    (tmp_path / "sitecustomize.py").write_text(text)
    path = os.pathsep.join(
        [str(tmp_path), os.environ.get("PYTHONPATH", str(Path(launcher.__file__).parent.parent.parent))]
    )
    code = "import sys, sitecustomize; print(sitecustomize.x, sys.modules['sitecustomize'] is sitecustomize)"
    expected = run("-c", code, cwd=programs, env={"PYTHONPATH": path})
    assert run("-c", code, cwd=programs, env={"PYTHONPATH": python_path.add_to(path)}) == expected


@pytest.mark.parametrize(
    "theirs",
    [None, "this is a syntax error", "raise RuntimeError", "", "dict[int, int, 1/0]"],
)
def test_a_python_without_pcsc_safe_notices_nothing(tmp_path: Path, theirs: Optional[str]) -> None:
    """If pcsc_safe is missing or this Python can't import it, a program runs as without it, and no output is added."""
    if theirs is not None:
        wrote(tmp_path / "pcsc_safe" / "__init__.py", theirs)
    env = {"PYTHONPATH": os.pathsep.join([python_path.DIRECTORY, str(tmp_path)])}
    code = "import sys; print('ran', [p for p in sys.path if 'retrofit/site' in p])"
    for python in [sys.executable, *OTHERS] if theirs is None else [sys.executable]:
        assert run("-c", code, cwd=tmp_path, env=env, python=python) == (0, "ran []\n", "")


OTHERS = sorted(
    {
        path
        for name in ("python2", "python3", *(f"python3.{minor}" for minor in range(6, 16)))
        if (path := shutil.which(name, path=f"{os.environ.get('PATH', '')}{os.pathsep}{os.defpath}"))
        and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0
    }
)
"""The Pythons of this machine; some may have pcsc_safe, most don't."""


def test_a_retrofit_that_fails_is_told(tmp_path: Path) -> None:
    """If the retrofit fails, the program prints a message when it imports pyscard, and continues."""
    code = """
import os, pcsc_safe.retrofit.installation
def install(): raise ValueError('no sense')
pcsc_safe.retrofit.installation.install = install
import smartcard, smartcard.scard
print(os.getpid())
"""
    done = run(*RUN, "-c", code, cwd=tmp_path)
    assert done == (0, done.out, f"pcsc_safe: process {done.out.strip()} runs without pcsc_safe: no sense\n")


def test_a_guard_that_makes_no_sense_is_told(tmp_path: Path) -> None:
    """If PCSC_SAFE_GUARD_NATIVE is invalid, the program prints a message with the valid values, and continues."""
    code = "import os; os.environ['PCSC_SAFE_GUARD_NATIVE'] = 'perhaps'; os.execl({0!r}, {0!r}, '-c', 'print(1)')"
    done = run(*RUN, "-c", code.format(sys.executable), cwd=tmp_path)
    assert (done.status, done.out) == (0, "1\n")
    assert "runs without pcsc_safe: PCSC_SAFE_GUARD_NATIVE cannot be 'perhaps'; use one of '1', 'true'" in done.err


def test_it_works_from_a_checkout(tmp_path: Path) -> None:
    """If ``-m`` finds pcsc_safe only in the current directory, the program finds it, too."""
    shutil.copytree(
        Path(launcher.__file__).parent.parent, tmp_path / "pcsc_safe", ignore=shutil.ignore_patterns("__pycache__")
    )
    env = {"PYTHONPATH": ""}
    program = tmp_path / "programs" / "main.py"
    wrote(program, "import pcsc_safe, sys; print(pcsc_safe.__file__, sys.path[0])")
    expected = f"{tmp_path / 'pcsc_safe' / '__init__.py'} {program.parent}\n"
    assert run(*RUN, str(program), cwd=tmp_path, env=env) == (0, expected, "")


def test_the_path_is_put_on_once_and_taken_off() -> None:
    """The directory is added to PYTHONPATH once and removed; the other entries stay.  An empty entry has a meaning."""
    here = python_path.DIRECTORY
    assert python_path.add_to("") == here
    assert python_path.add_to("a::b") == f"{here}:a::b"
    assert python_path.add_to(python_path.add_to("a"), ["z"]) == f"{here}:a:z"
    assert python_path.remove_from(f"{here}:a:{here}:b:") == "a:b:"


def test_a_broker_is_not_retrofitted() -> None:
    """A broker inherits neither the directory nor the report."""
    mine = {"PYTHONPATH": python_path.add_to("/a"), events.VARIABLE: "/file", "PCSC_SAFE_POLICY": "raise"}
    assert start.environment(mine) == {"PYTHONPATH": "/a", "PYTHONSAFEPATH": "1"}
    assert start.environment({"PYTHONPATH": python_path.DIRECTORY}) == {"PYTHONSAFEPATH": "1"}


def test_it_is_shipped() -> None:
    """A wheel contains the directory, because it is Python code like the rest."""
    assert Path(python_path.DIRECTORY, "sitecustomize.py").is_file()


# The report.


def test_without_a_report_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a report, events are not recorded."""
    assert not events.is_on()
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("a file was opened"))
    events.record("fork", parent=1)
    events.process_started(1, "broker", "broker")
    assert recorder.wrap_call(CALLS["SCardConnect"], print) is print
    assert recorder.wrap_follow_up("SCardTransmit", None) is None


def test_the_report_is_by_process() -> None:
    """The report has a line of sums, then the events of each process, unknown ones included, without the timeline's."""
    told = [
        Event(1, "2-1", "process", 2, {"ppid": 1}),
        Event(2, "2-1", "retrofit", 2, {}),
        Event(3, "2-1", "connected", 2, {}),
        Event(4, "3-4", "process", 3, {"ppid": 2}),
        Event(5, "3-4", "fork", 3, {"parent": 2}),
        Event(6, "3-4", "reestablished", 3, {"owner": 2, "at": "x.py:1"}),
        Event(7, "3-4", "reestablished", 3, {"owner": 2, "at": "x.py:2"}),
        Event(8, "2-1", "recovered", 2, {}),
        Event(8, "2-1", "broker", 2, {"broker": 9}),
        Event(8, "9-8", "process", 2, {"ppid": 2}),
        Event(9, "2-1", "handover", 2, {"contexts": 1}),
        Event(9, "3-4", "news", 3, {"a": "b"}),
    ]
    assert report.summary(told) == (
        "pcsc_safe: forked processes that used PC/SC: 1, contexts re-established: 2, brokers started: 1, handovers: 1\n"
        "  process 2, parent 1\n"
        "    imported pyscard, and runs on pcsc_safe\n"
        "    established a new context after pcscd had ended\n"
        "    started the broker 9\n"
        "    handed 1 context(s) over to a forked child\n"
        "  process 3, parent 2\n"
        "    used PC/SC after its fork from process 2\n"
        "    has a new context, which replaces process 2's (2 times)\n"
        "    news a=b\n"
    )


@pytest.mark.parametrize("option", ["--report", "--timeline=drawn.svg"])
def test_the_exit_status_without_a_report(tmp_path: Path, option: str) -> None:
    """If the record is lost, a message says so, and the exit status is still the program's."""
    code = "import os, shutil, sys; shutil.rmtree(os.environ['PCSC_SAFE_REPORT']); sys.exit(42)"
    done = run(*RUN, option, "-c", code, cwd=tmp_path)
    assert (done.status, done.out) == (42, "")
    assert re.fullmatch(r"pcsc_safe: no report: .*No such file or directory.*\n", done.err)


@pytest.mark.parametrize("options", [[], ["--report"], ["--timeline=drawn.svg"]], ids=" ".join)
def test_the_exit_status_where_sigchld_is_ignored(tmp_path: Path, options: list[str]) -> None:
    """An inherited, ignored SIGCHLD doesn't hide how the program ends, and the program inherits it, too."""
    ignore = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    )
    code = "import signal, sys; sys.exit(3 + signal.getsignal(signal.SIGCHLD))"
    done = run("-c", ignore, sys.executable, *RUN, *options, "-c", code, cwd=tmp_path)
    assert (done.status, done.out) == (3 + signal.SIG_IGN, "")


def test_no_timeline_on_this_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where processes can't be recorded, the option is refused, and the message says where it works."""
    refused: list[str] = []

    def refuse(text: str) -> None:
        refused.append(text)
        raise SystemExit(2)

    monkeypatch.setattr(launcher, "os", SimpleNamespace(name="nt"))
    with pytest.raises(SystemExit):
        launcher._checked(argparse.Namespace(timeline="drawn.svg", refuse=refuse))
    assert refused == ["--timeline is unsupported on this platform: use it on Linux or macOS"]


LISTENS = """
import os, signal, sys, time
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append('int'))
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, f'{heard}\\n'.encode()), os._exit(5)))  # print() may be going on
print('ready', flush=True)
while True:
    time.sleep(0.01)
    if heard and heard[-1] == 'int':
        heard.append('told')
        print('told', flush=True)
"""


@pytest.mark.parametrize("before", [":", "trap '' INT"], ids=["default", "ignored"])
@pytest.mark.parametrize("options", [[], ["--report"]], ids=["plain", "report"])
def test_signals_reach_the_program(tmp_path: Path, options: list[str], before: str) -> None:
    """A signal to the process that was started reaches the program once, also if a shell had it ignored."""
    with subprocess.Popen(
        ["sh", "-c", f'{before}; exec "$@"', "sh", sys.executable, *RUN, *options, "-c", LISTENS],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(30, os.killpg, (process.pid, signal.SIGKILL))
        watchdog.start()
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "told\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.read() == "['int', 'told']\n"
            assert process.wait(10) == 5
        finally:
            watchdog.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


FORKS = """
import os, sys
from smartcard.scard import *

hresult, context = SCardEstablishContext(SCARD_SCOPE_SYSTEM)
pid = os.fork()
if not pid:
    hresult, readers = SCardListReaders(context, [])
    print(hresult == SCARD_S_SUCCESS and len(readers), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
print(SCardIsValidContext(context) == SCARD_S_SUCCESS, flush=True)  # it is killed
os.kill(os.getpid(), 15)
"""


@pytest.mark.parametrize("way", [[], ["sub.py"]], ids=["program", "child of a program"])
def test_a_program_is_retrofitted(shared_stack: VirtualPcsc, programs: Path, way: list[str]) -> None:
    """An unmodified program, and one that it starts, survives a fork; the report says so, however the program ended."""
    (programs / "forks.py").write_text(FORKS)
    done = run(*RUN, "--report", *way, "forks.py", cwd=programs, env=shared_stack.env)
    assert done.out.splitlines()[:2] == [str(len(shared_stack.readers)), "True"]
    assert done.status == (0 if way else -signal.SIGTERM)
    assert f"{REPORTED}1, contexts re-established: 1, brokers started: 0, handovers: 0\n" in done.err
    assert done.err.count("imported pyscard, and runs on pcsc_safe") == 1


FIRST_IN_A_CHILD = """
import os, sys
assert not {'smartcard', 'wrapt'} & set(sys.modules)
pid = os.fork()
if pid:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
MODULE
import pcsc_safe._core.process
epoch = pcsc_safe._core.process.current()
print(epoch.number, epoch.noticed_by)
hresult, context = scard.SCardEstablishContext(0)
print(hresult, hasattr(context, '_self_record'))
"""


@pytest.mark.parametrize("module", ["from smartcard import scard", "from pcsc_safe import scard"])
@pytest.mark.parametrize("broker", ["on-fork", "always"])
def test_a_child_may_be_the_first_to_import_pyscard(
    shared_stack: VirtualPcsc, tmp_path: Path, module: str, broker: str
) -> None:
    """If a child is the first to import pyscard, it knows that it was forked; ``import pcsc_safe`` works as usual."""
    code = FIRST_IN_A_CHILD.replace("MODULE", module)
    done = run(*RUN, "--broker", broker, "-c", code, cwd=tmp_path, env=shared_stack.env)
    assert done == (0, "1 hook\n0 True\n", "")


@pytest.mark.parametrize("policy", ["broker", "share"])
def test_brokers_are_in_the_report(shared_stack: VirtualPcsc, programs: Path, policy: str) -> None:
    """The report lists each broker that was started, but not the broker's own use of PC/SC."""
    (programs / "forks.py").write_text(FORKS)
    options = ["--policy", policy, *(["--broker", "always"] if policy == "share" else [])]
    done = run(*RUN, "--report", *options, "forks.py", cwd=programs, env=shared_stack.env)
    assert done.out.splitlines() == [str(len(shared_stack.readers)), "True"]
    assert "brokers started: 1, handovers: 0\n" in done.err
    assert done.err.count("imported pyscard, and runs on pcsc_safe") == 1
    assert ("shared 1 context(s)" in done.err) == (policy == "share")


def test_a_handover_is_in_the_report(shared_stack: VirtualPcsc, programs: Path) -> None:
    """``--owner child`` hands over the session at every fork."""
    (programs / "forks.py").write_text(FORKS)
    done = run(*RUN, "--report", "--owner=child", "forks.py", cwd=programs, env=shared_stack.env)
    assert done.out.splitlines()[0] == str(len(shared_stack.readers))
    assert "handovers: 1\n" in done.err
    assert "handed 1 context(s) over to a forked child" in done.err
