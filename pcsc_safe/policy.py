"""Settings, and :func:`decide`, which says what a process gets when it uses an inherited object.

Nothing here touches PC/SC, a lock or a file descriptor.  :func:`decide` depends only on its arguments, so that the
whole table of docs/policies.md can be read and tested in one place.  At a fork a child inherits the settings like any
other value.
"""

import enum
import os
import sys
from collections.abc import Mapping
from typing import Any, Callable, NamedTuple, TypeVar

from .errors import SettingsError

__all__ = [
    "OTHER_VARIABLES",
    "PLATFORM",
    "SETTINGS",
    "Broker",
    "Cards",
    "Owner",
    "Policy",
    "Role",
    "Setting",
    "Settings",
    "Verdict",
    "Way",
    "choose_way",
    "decide",
    "from_environment",
    "misspelt",
    "native_works_after_fork",
    "option",
    "parse",
    "variable",
]


class Policy(str, enum.Enum):
    """What a process gets when it first uses a context that it inherited; docs/policies.md explains each policy.

    :cvar AUTO: the default: ``reestablish`` if the process can use PC/SC itself, and otherwise ``broker``.
    :cvar REESTABLISH: a new context in this process; ForkUnsafeError if it can't use PC/SC itself.
    :cvar BROKER: a new context in a broker.
    :cvar SHARE: the owner's session, together with the owner; needs ``broker="always"``.
    :cvar RAISE: ForkedHandleError.
    :cvar INVALID: SCARD_E_INVALID_HANDLE.
    """

    AUTO = "auto"
    REESTABLISH = "reestablish"
    BROKER = "broker"
    SHARE = "share"
    RAISE = "raise"
    INVALID = "invalid"


class Cards(str, enum.Enum):
    """What calls on an inherited card handle do under the policies ``auto``, ``reestablish`` and ``broker``.

    :cvar AUTO: the first call connects again if the owner's session continues; if not, it returns SCARD_W_RESET_CARD;
        the default.
    :cvar RESET: calls return SCARD_W_RESET_CARD until SCardReconnect.
    :cvar RECONNECT: the first call connects again, unless the owner was in a transaction when the process forked.
    """

    AUTO = "auto"
    RESET = "reset"
    RECONNECT = "reconnect"


class Broker(str, enum.Enum):
    """When a helper process makes the PC/SC calls.

    :cvar ON_FORK: the default: in a forked process that can't use PC/SC itself, or has policy ``broker``; and, with
        ``recover``, in a process that can't list readers after a restart of pcscd.
    :cvar ALWAYS: for all contexts that are established from now on.
    """

    ON_FORK = "on-fork"
    ALWAYS = "always"


class Owner(str, enum.Enum):
    """Which process owns the sessions after a fork.

    :cvar PARENT: the process that forked; the default.
    :cvar CHILD: the child of every fork, as with :class:`pcsc_safe.handover`.
    """

    PARENT = "parent"
    CHILD = "child"


class Setting:
    """The default, the description and the possible values of a setting.

    :ivar default: its value if it is not set.
    :ivar summary: what it is for, in a line.
    :ivar of_context: whether a context can have a different value.
    """

    def __init__(self, default: Any, summary: str, of_context: bool) -> None:
        self.default = default
        self.summary = summary
        self.of_context = of_context

    def parse(self, value: Any) -> Any:
        """Convert what a user gave, a value or its text; the type of the default decides which values are allowed.

        :raises ValueError: the value is not allowed; the text says what to use.
        """
        kind = type(self.default)
        return _member_of(kind)(value) if issubclass(kind, enum.Enum) else _PARSERS[kind](value)

    def choices(self) -> list[str]:
        """The words that are allowed; empty if the setting is not a choice of words."""
        kind = type(self.default)
        return [member.value for member in kind] if issubclass(kind, enum.Enum) else []

    def default_as_text(self) -> str:
        """The default as a user would write it, for the documentation and for ``--help``."""
        value = int(self.default) if isinstance(self.default, bool) else self.default
        return str(getattr(value, "value", value)) or '""'

    def description(self) -> str:
        """What it is for, the words that are allowed, and the default, for ``--help`` and ``help()``."""
        words = ", ".join(self.choices())
        summary = f"{self.summary}: {words}" if words else self.summary
        return f"{summary} (default: {self.default_as_text()})"


_rows: list[Setting] = []
_Value = TypeVar("_Value")


def _setting(default: _Value, summary: str, *, of_context: bool = False) -> _Value:
    _rows.append(Setting(default, summary, of_context))
    return default


class Settings(NamedTuple):
    """All settings; :func:`pcsc_safe.configure` explains them."""

    policy: Policy = _setting(
        Policy.AUTO, "what happens when a process first uses a context that it inherited", of_context=True
    )
    cards: Cards = _setting(Cards.AUTO, "what calls on an inherited card handle do", of_context=True)
    quiesce_timeout: float = _setting(
        1.0, "the longest time, in seconds, that a fork waits for PC/SC calls of other threads to return"
    )
    broker: Broker = _setting(
        Broker.ON_FORK,
        "which processes use a broker, a helper process; on-fork: those forked ones that can't use PC/SC themselves",
    )
    broker_python: str = _setting(
        "", "the path of the Python interpreter that runs brokers; if empty, the one that runs the program"
    )
    owner: Owner = _setting(Owner.PARENT, "which process owns the sessions after a fork")
    guard_native: bool = _setting(
        False,
        "whether forked children lose the connections to pcscd that PKCS#11 modules and other native code have opened",
    )
    spare_cards: bool = _setting(
        True,
        "whether pyscard's disconnect() and reconnect() by default reset no card that related processes also use",
    )
    recover: bool = _setting(False, "whether contexts are re-established after a restart of pcscd", of_context=True)

    def changed(self, **values: Any) -> "Settings":
        """These settings with some replaced.

        :raises SettingsError: a setting can't have this value.
        """
        return self._replace(**{name: parse(name, value) for name, value in values.items()}).checked()

    def checked(self) -> "Settings":
        """These settings, if they are consistent.

        :raises SettingsError: two settings contradict each other.
        """
        if self.policy is Policy.SHARE and self.broker is not Broker.ALWAYS:
            raise SettingsError(
                f"policy cannot be 'share' while broker is {self.broker.value!r}",
                remedy="shared sessions live in a broker: set broker='always' as well",
            )
        return self


def _member_of(kind: type[enum.Enum]) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        try:
            return kind(value)
        except ValueError:
            choices = ", ".join(repr(member.value) for member in kind)
            raise ValueError(f"use one of {choices}") from None

    return convert


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds <= _LONGEST_TIMEOUT or isinstance(value, bool):
        raise ValueError(f"use a number of seconds from 0 to {_LONGEST_TIMEOUT}")
    return seconds


def _path(value: Any) -> str:
    try:
        path = os.fspath(value)
    except TypeError:
        path = b""
    if not isinstance(path, str) or "\0" in path:
        raise ValueError("use the path of a Python interpreter, or '' for the one that runs this program")
    return path


def _switch(value: Any) -> bool:
    try:
        return _SWITCH[str(value).lower()]
    except KeyError:
        choices = ", ".join(map(repr, _SWITCH))
        raise ValueError(f"use one of {choices}") from None


_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_LONGEST_TIMEOUT = 86400
_PARSERS: dict[type, Callable[[Any], Any]] = {bool: _switch, float: _seconds, str: _path}

SETTINGS: dict[str, Setting] = dict(zip(Settings._fields, _rows))
"""Every setting by its name, which is also its keyword in :func:`pcsc_safe.configure`, its option of ``run`` and, with
``PCSC_SAFE_`` before it, its environment variable."""


_PREFIX = "PCSC_SAFE_"


def variable(setting: str) -> str:
    """The environment variable of a setting."""
    return f"{_PREFIX}{setting.upper()}"


def option(setting: str) -> str:
    """The option of ``python -m pcsc_safe run`` for a setting."""
    return f"--{setting.replace('_', '-')}"


def parse(setting: str, value: Any, called: str = "") -> Any:
    """Convert what a user gave to the value of a setting.

    :param setting: a field of :class:`Settings`.
    :param value: what a user gave: the value itself, or its text.
    :param called: the name by which the user has set it, for the error.
    :raises SettingsError: the setting cannot have this value.
    """
    try:
        return SETTINGS[setting].parse(value)
    except ValueError as error:
        raise SettingsError(f"{called or setting} cannot be {value!r}", remedy=str(error)) from None


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """The defaults, changed by the variables PCSC_SAFE_*; an empty variable changes nothing.

    :raises SettingsError: a variable has a value that its setting cannot have.
    """
    given = {}
    for setting in Settings._fields:
        name = variable(setting)
        if environment.get(name):
            given[setting] = parse(setting, environment[name], name)
    return Settings(**given).checked()


OTHER_VARIABLES = frozenset({"PCSC_SAFE_REPORT", "PCSC_SAFE_PYTHON", "PCSC_SAFE_DEMO_PCSCD"})
"""Variables that other parts of the project read; they are not settings."""


def misspelt(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables PCSC_SAFE_* that nothing reads, each with a variable of a similar name, or ``""``."""
    known = {variable(setting): setting for setting in Settings._fields}
    ours = [name for name in sorted(environment) if name.startswith(_PREFIX)]
    unknown = [name for name in ours if name not in known and name not in OTHER_VARIABLES]
    if not unknown:
        return {}
    from difflib import get_close_matches  # few environments have one, and this module is imported by every program

    found = {name: get_close_matches(name[len(_PREFIX) :].lower(), known.values(), 1) for name in unknown}
    return {name: variable(close[0]) if close else "" for name, close in found.items()}


class Role(enum.Enum):
    """What a PC/SC function means to a process that inherited its handle."""

    USE = enum.auto()
    CLEANUP = enum.auto()
    CANCEL = enum.auto()
    VALIDITY = enum.auto()
    RECONNECT = enum.auto()


class Verdict(enum.Enum):
    """What to do with a call on an inherited handle."""

    FORGET = enum.auto()  # forget this process's copy only; return SCARD_S_SUCCESS
    SUCCEED = enum.auto()  # do nothing; return SCARD_S_SUCCESS
    RAISE = enum.auto()  # raise ForkedHandleError
    INVALID = enum.auto()  # return SCARD_E_INVALID_HANDLE
    REESTABLISH = enum.auto()  # establish a context for this process, then make the call
    RESET = enum.auto()  # return SCARD_W_RESET_CARD
    RECONNECT = enum.auto()  # connect as the arguments of SCardReconnect say
    CONNECT = enum.auto()  # connect as the owner did, then make the call
    CONTINUE = enum.auto()  # as CONNECT if the owner's session continues, otherwise as RESET
    JOIN = enum.auto()  # join the owner's session, then make the call


def decide(settings: Settings, role: Role, *, card: bool, in_transaction: bool = False) -> Verdict:
    """What a call on an inherited handle gets.

    :param settings: of this process, or of this context.
    :param role: what the called function means in a process that inherited the handle.
    :param card: whether the handle is of a card, not of a context.
    :param in_transaction: whether the owner was in a transaction when the process forked.
    """
    if role is Role.CLEANUP:
        return Verdict.FORGET
    if role is Role.CANCEL:
        return Verdict.SUCCEED
    if settings.policy is Policy.INVALID or (settings.policy is Policy.RAISE and role is Role.VALIDITY):
        return Verdict.INVALID
    if settings.policy is Policy.RAISE:
        return Verdict.RAISE
    if settings.policy is Policy.SHARE:
        return Verdict.JOIN
    if not card:
        return Verdict.REESTABLISH
    if role is Role.RECONNECT:
        return Verdict.RECONNECT
    if settings.cards is Cards.AUTO:
        return Verdict.CONTINUE
    if settings.cards is Cards.RECONNECT and not in_transaction:
        return Verdict.CONNECT
    return Verdict.RESET


PLATFORM = sys.platform
"""What :func:`native_works_after_fork` checks; tests set it."""


def native_works_after_fork() -> bool:
    """Whether a forked process may use the native library on this platform.

    Not on macOS: since Yosemite, using an inherited context crashes with SIGSEGV in libdispatch, and since El Capitan
    even a new SCardEstablishContext returns SCARD_E_NO_SERVICE (LudovicRousseau/pyscard#73).
    """
    return PLATFORM != "darwin"


class Way(enum.Enum):
    """How a process reaches PC/SC."""

    NATIVE = enum.auto()
    BROKER = enum.auto()
    NONE = enum.auto()


def choose_way(settings: Settings, *, forked: bool, native_works: bool) -> Way:
    """How a process gets a new context.

    :param settings: of this process, or of the context that the new one replaces.
    :param forked: whether this process was forked, and not exec'd, since pcsc_safe was imported.
    :param native_works: whether this process can use the native library.
    """
    if settings.broker is Broker.ALWAYS or (forked and settings.policy is Policy.BROKER):
        return Way.BROKER
    if native_works:
        return Way.NATIVE
    return Way.NONE if settings.policy is Policy.REESTABLISH else Way.BROKER
