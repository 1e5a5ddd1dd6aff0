"""The command line: what ``python -m pcsc_safe`` prints, and its exit status."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

import pytest
from places import PYTHON, ROOT

import pcsc_safe
from pcsc_safe import __main__ as cli
from pcsc_safe.policy import SETTINGS, Broker, option
from pcsc_safe.testing import _versions


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pcsc_safe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_version_names_everything_that_a_bug_report_wants() -> None:
    """``version`` prints the versions of pcsc_safe, Python, pyscard and wrapt, and the platform, one per line."""
    done = run("version")
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert (done.returncode, done.stderr) == (0, "")
    assert list(told) == ["pcsc_safe", "python", "pyscard", "wrapt", "platform"]
    assert told["pcsc_safe"] == pcsc_safe.__version__
    assert told["python"] == platform.python_version()


def test_the_option_version() -> None:
    """``--version`` prints the first line of ``version``."""
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"pcsc_safe {pcsc_safe.__version__}\n", "")


def test_version_json_says_the_same() -> None:
    """``version --json`` prints one object with the same keys and values."""
    assert json.loads(run("version", "--json").stdout) == _versions.versions()


def test_version_works_where_a_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """``version`` reports a missing package as not installed: it has to work in such an installation."""
    import importlib.metadata as metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert _versions.versions()["pyscard"] == "not installed"


def test_version_loads_no_pcsc() -> None:
    """``version`` loads neither pyscard nor wrapt, so it works in a broken installation."""
    code = (
        "import sys; from pcsc_safe.__main__ import main; main(['version']); "
        "sys.exit(any(name in sys.modules for name in ('smartcard', 'wrapt')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=False).returncode == 0


def test_a_command_pays_for_no_other() -> None:
    """``run`` imports neither the demo nor the doctor, so it starts quickly."""
    code = (
        "import sys; from pcsc_safe.__main__ import main; main(['version']); "
        "sys.exit(any(name in sys.modules for name in ('pcsc_safe.demo', 'pcsc_safe.doctor', 'pcsc_safe.retrofit')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=False).returncode == 0


def completed(*words: str) -> set[str]:
    """The completions that bash offers for the last word of a command line."""
    script = f"""{run("completion", "bash").stdout}
COMP_WORDS=({" ".join(f"'{word}'" for word in words)}); COMP_CWORD={len(words) - 1}
_pcsc_safe; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-u", "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes() -> None:
    """Completion in bash offers commands, options, values of settings, and files where a command takes a program."""
    assert completed("pcsc-safe", "") == {*cli.COMMANDS, "--help", "--version"}
    assert completed("pcsc-safe", "do") == {"doctor"}
    assert completed("pcsc-safe", "doctor", "--t") == {"--touch-cards", "--timeout"}
    assert completed("pcsc-safe", "run", "--policy", "re") == {"reestablish"}
    assert completed("pcsc-safe", "run", "--broker", "") == {broker.value for broker in Broker}
    assert completed("pcsc-safe", "run", "") == completed("pcsc-safe", "run", "--timeline", "") == set()
    assert completed("pcsc-safe", "completion", "") == {"bash", "zsh", "fish", "--help"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_is_for_everything(shell: str) -> None:
    """A completion has each command and each setting, and its shell can parse it."""
    script = run("completion", shell).stdout
    assert all(name in script for name in cli.COMMANDS)
    assert all(option(name).lstrip("-") in script for name in SETTINGS)
    if shutil.which(shell):
        command = [shell, "--no-execute" if shell == "fish" else "-n"]
        done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_the_console_script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``pcsc-safe`` is the same command line, with its own name in the usage."""
    project = (ROOT / "pyproject.toml").read_text()
    assert 'pcsc-safe = "pcsc_safe.__main__:main"' in project
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pcsc-safe", "run", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out.startswith("usage: pcsc-safe run [options] script.py")


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Every command's help ends with 0; the list of commands is complete."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert said.startswith("usage: python -m pcsc_safe")
    assert all(name in said for name in (cli.COMMANDS if len(arguments) == 1 else arguments[:1]))


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["version", "--no-such-option"]])
def test_a_wrong_call_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong arguments end with 2, and the usage is printed to stderr."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_wrong_option_is_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """An option that a command doesn't have is refused with the command's own usage, not that of the command line."""
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([name, *(["bash"] if name == "completion" else []), "--no-such-option"])
        usage, error = capsys.readouterr().err.rsplit("\n", 2)[:2]
        assert usage.startswith(f"usage: python -m pcsc_safe {name} ")
        assert error == f"python -m pcsc_safe {name}: error: {name} has no option --no-such-option"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    "arguments",
    [
        "pcsc_safe version",
        "pcsc_safe version --help",
        "pcsc_safe --help",
        "pcsc_safe --version",
        "pcsc_safe completion bash",
        f"pcsc_safe doctor --json --pid {os.getpid()}",
        f"pcsc_safe doctor --pid {os.getpid()}",
        "pcsc_safe.testing --help",
    ],
)
def test_a_full_disk(arguments: str, unbuffered: str) -> None:
    """What can't be written ends a command with one line and 2, which isn't the doctor's "found a problem"."""
    command = [sys.executable, "-m", *arguments.split()]
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=env, text=True, timeout=30, check=False)
        silent = subprocess.run(command, stdout=full, stderr=full, env=env, timeout=30, check=False)
    assert done.stderr == f"python -m {command[2]}: [Errno 28] No space left on device\n"
    assert (done.returncode, silent.returncode) == (2, 2)


@pytest.mark.skipif(sys.platform == "win32", reason="it needs a Unix shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_output(closed: str) -> None:
    """If stdout or stderr is closed, a command ends as if it were /dev/null, and writes nothing to the other one."""
    for arguments, status in (("version", 0), ("doctor --pid $$", 0), ("--help", 0), ("demo --only 99", 2)):
        script = f"{PYTHON} -m pcsc_safe {arguments} {closed}; exit $?"
        done = subprocess.run(["sh", "-c", script], capture_output=True, timeout=30, check=False)
        assert done.returncode == status, done.stderr
        assert bool(done.stdout) == (status == 0 and ">&-" not in closed.split())
        assert bool(done.stderr) == (status == 2 and "2>&-" not in closed.split())


def test_a_reader_that_reads_no_further() -> None:
    """``| head`` ends a command without a traceback."""
    command = [sys.executable, "-m", "pcsc_safe", "version"]
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, timeout=30, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_interrupt_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends a command with the status that a shell expects."""

    def interrupted(options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(_versions, "main", interrupted)
    assert cli.main(["version"]) == 130
