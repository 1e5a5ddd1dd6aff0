"""Settings, and the pure decision what a process gets that uses what it inherited.

Nothing here touches PC/SC, a lock or a descriptor: :func:`decide` is a function of its arguments, so that the table of
DESIGN section 3 can be read, and tested, in one place.  At a fork the settings are inherited as any other value.
"""

import enum
import os
import sys
from collections.abc import Mapping
from typing import Any, Callable, NamedTuple

from .errors import SettingsError

__all__ = [
    "PLATFORM",
    "Broker",
    "Cards",
    "Owner",
    "Policy",
    "Role",
    "Settings",
    "Verdict",
    "Way",
    "choose_way",
    "decide",
    "from_environment",
    "native_works_after_fork",
]


class Policy(str, enum.Enum):
    """What the first use of an inherited context gives."""

    AUTO = "auto"
    REESTABLISH = "reestablish"
    BROKER = "broker"
    SHARE = "share"
    RAISE = "raise"
    INVALID = "invalid"


class Cards(str, enum.Enum):
    """What an inherited card handle does while its context may be re-established."""

    RESET = "reset"
    RECONNECT = "reconnect"


class Broker(str, enum.Enum):
    """When PC/SC is done by a helper process."""

    ON_FORK = "on-fork"
    ALWAYS = "always"


class Owner(str, enum.Enum):
    """Who has the sessions after a fork."""

    PARENT = "parent"
    CHILD = "child"


class Settings(NamedTuple):
    """How this process treats what it inherits; see :func:`pcsc_safe.configure`."""

    policy: Policy = Policy.AUTO
    cards: Cards = Cards.RESET
    quiesce_timeout: float = 1.0
    broker: Broker = Broker.ON_FORK
    broker_python: str = ""
    owner: Owner = Owner.PARENT
    guard_native: bool = False
    recover: bool = False

    def changed(self, **values: Any) -> "Settings":
        """These settings with some replaced.

        :raises SettingsError: a value is not one that the setting can have.
        """
        return self._replace(**{name: parse(name, value) for name, value in values.items()}).checked()

    def checked(self) -> "Settings":
        """These settings, if they go together.

        :raises SettingsError: they don't.
        """
        if self.policy is Policy.SHARE and self.broker is not Broker.ALWAYS:
            raise SettingsError(
                f"policy cannot be 'share' while broker is {self.broker.value!r}",
                remedy="a session that several processes share lives in a broker: set broker='always' as well",
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
_CONVERT: dict[str, Callable[[Any], Any]] = {
    "policy": _member_of(Policy),
    "cards": _member_of(Cards),
    "quiesce_timeout": _seconds,
    "broker": _member_of(Broker),
    "broker_python": _path,
    "owner": _member_of(Owner),
    "guard_native": _switch,
    "recover": _switch,
}


def parse(setting: str, value: Any, called: str = "") -> Any:
    """The value that a setting gets.

    :param setting: a field of :class:`Settings`.
    :param value: what a user gave, as the thing itself or as text.
    :param called: what the user knows the setting as, for the error.
    :raises SettingsError: the setting cannot have this value.
    """
    try:
        return _CONVERT[setting](value)
    except ValueError as error:
        raise SettingsError(f"{called or setting} cannot be {value!r}", remedy=str(error)) from None


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """The defaults, with what the variables PCSC_SAFE_* say; an empty variable says nothing.

    :raises SettingsError: a variable has a value that its setting cannot have.
    """
    given = {}
    for setting in Settings._fields:
        variable = f"PCSC_SAFE_{setting.upper()}"
        if environment.get(variable):
            given[setting] = parse(setting, environment[variable], variable)
    return Settings(**given).checked()


class Role(enum.Enum):
    """What a PC/SC function means to a process that inherited its handle."""

    USE = enum.auto()
    CLEANUP = enum.auto()
    CANCEL = enum.auto()
    VALIDITY = enum.auto()
    RECONNECT = enum.auto()


class Verdict(enum.Enum):
    """What to do with a call on an inherited handle."""

    FORGET = enum.auto()  # this process's copy only; answer SCARD_S_SUCCESS
    SUCCEED = enum.auto()  # answer SCARD_S_SUCCESS, do nothing
    RAISE = enum.auto()  # ForkedHandleError
    INVALID = enum.auto()  # answer SCARD_E_INVALID_HANDLE
    REESTABLISH = enum.auto()  # a context of this process's own, then the call
    RESET = enum.auto()  # answer SCARD_W_RESET_CARD
    RECONNECT = enum.auto()  # a connection as SCardReconnect asks for
    CONNECT = enum.auto()  # a connection as the inherited one was, then the call
    JOIN = enum.auto()  # take part in the owner's session, then the call


def decide(settings: Settings, role: Role, *, card: bool, in_transaction: bool = False) -> Verdict:
    """What a call on an inherited handle gets.

    :param settings: of this process, or of this context.
    :param role: what the called function means.
    :param card: the handle is a card's, not a context's.
    :param in_transaction: the owner was inside a transaction when the process forked.
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
    if settings.cards is Cards.RECONNECT and not in_transaction:
        return Verdict.CONNECT
    return Verdict.RESET


PLATFORM = sys.platform
"""What :func:`native_works_after_fork` asks; the tests set it."""


def native_works_after_fork() -> bool:
    """Whether a forked process may use the native library on this platform.

    Not on macOS: an inherited context dies of SIGSEGV in libdispatch since Yosemite, and since El Capitan even a fresh
    SCardEstablishContext answers SCARD_E_NO_SERVICE (LudovicRousseau/pyscard#73).
    """
    return PLATFORM != "darwin"


class Way(enum.Enum):
    """How a process reaches PC/SC."""

    NATIVE = enum.auto()
    BROKER = enum.auto()
    NONE = enum.auto()


def choose_way(settings: Settings, *, forked: bool, native_works: bool) -> Way:
    """How a process gets a new context.

    :param settings: of this process, or of the context in whose place the new one is.
    :param forked: this process was forked, and not exec'd, since pcsc_safe was imported.
    :param native_works: the native library can be used in this process.
    """
    if settings.broker is Broker.ALWAYS or (forked and settings.policy is Policy.BROKER):
        return Way.BROKER
    if native_works:
        return Way.NATIVE
    return Way.NONE if settings.policy is Policy.REESTABLISH else Way.BROKER
