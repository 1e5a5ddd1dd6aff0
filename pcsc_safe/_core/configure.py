"""``pcsc_safe.configure()``: the only place where settings are changed.

:class:`pcsc_safe.policy.Settings` lists the settings: a new one is a row there.  At a fork nothing changes: a child
inherits the settings, and may change its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Optional, Union

from ..errors import SettingsError
from ..policy import SETTINGS, Broker, Cards, Owner, Policy, Settings
from . import connections, handles, readiness, settings  # noqa: F401  # connections: for guard_native, without any call of PC/SC
from .calls import Kind

__all__ = ["configure"]

if not TYPE_CHECKING:

    def configure(*, context=None, **given):
        unknown = given.keys() - SETTINGS.keys()
        if unknown:
            raise TypeError(f"configure() got an unexpected keyword argument {min(unknown)!r}")
        given = {name: value for name, value in given.items() if value is not None}
        changed = settings.settings().changed(**given)
        return settings.put_in_force(changed) if context is None else _configure_context(context, changed, given)

    _rows = [f"{name}: {row.summary}" for name, row in SETTINGS.items()]
    configure.__doc__ = "\n    ".join(["Change settings of this process, or of one context.\n", *_rows])
else:  # what type checkers and the documentation know

    def configure(
        *,
        policy: Union[Policy, str, None] = None,
        cards: Union[Cards, str, None] = None,
        quiesce_timeout: Union[float, str, None] = None,
        broker: Union[Broker, str, None] = None,
        broker_python: Optional[str] = None,
        owner: Union[Owner, str, None] = None,
        guard_native: Union[bool, str, None] = None,
        spare_cards: Union[bool, str, None] = None,
        recover: Union[bool, str, None] = None,
        context: Any = None,
    ) -> Settings:
        """Say what a process gets that uses a context or card which it inherited over a fork.

        It can be called at any time, in the parent or in the child, and counts from the next call on.  What is not
        given stays as it was.

        :param policy: ``auto`` (the default), ``reestablish``, ``broker``, ``share``, ``raise`` or ``invalid``.
        :param cards: what an inherited card handle does. ``auto``, the default: the first call connects again, and goes
            on, where the owner's session goes on as well; else it returns SCARD_W_RESET_CARD, until SCardReconnect.
            ``reset``: it returns that in any case. ``reconnect``: the first call connects again in any case.
        :param quiesce_timeout: seconds that a fork waits, at most, for the calls that other threads have in flight.
        :param broker: when PC/SC is done by a helper process: ``on-fork`` (the default), where a forked process can't
            do it itself, or ``always``.  The latter counts for the contexts that are established from then on; to keep
            the native library out of the process it has to be set before :mod:`pcsc_safe.scard` is imported.
        :param broker_python: the Python interpreter that runs brokers; ``""``, the default: the one that runs this
            program.
        :param owner: who has the sessions after a fork: the ``parent`` (the default), or the ``child``, as in
            :func:`pcsc_safe.handover`.
        :param guard_native: whether the children that are forked from now on are to have none of this process's
            connections to pcscd, those included that a PKCS#11 module or other native code has opened, so that what
            becomes of a child doesn't reach the sessions of such code; not, by default.
        :param spare_cards: whether what pyscard does by default (disconnect() powers a card off, reconnect() resets it)
            leaves a card alone that another process of the family uses as well; so it is, by default.
        :param recover: whether contexts are re-established when pcscd was restarted, or has ended and is started by the
            next use.  Their cards are treated as if they were inherited; see ``cards``.
        :param context: a context, for settings that are to count for it and its cards alone.
        :return: the settings that are in force now, for that context if one was given.
        :raises SettingsError: a value is not one of these, or ``context`` is no context of this process, or the setting
            is one that a context can't have for itself.
        """
        raise NotImplementedError


def _configure_context(context: Any, changed: Settings, given: Iterable[str]) -> Settings:
    for name in given:
        if not SETTINGS[name].of_context:
            raise SettingsError(f"{name} cannot be set for one context", remedy="configure the process")
    record = handles.find(Kind.CONTEXT, context)
    if not isinstance(record, handles.Context) or record.released:
        raise SettingsError(
            "context is not a context that SCardEstablishContext gave",
            remedy="pass one that is not released, or leave it out to configure the process",
        )
    settings.for_contexts = True
    record.overrides = {**record.overrides, **{name: getattr(changed, name) for name in given}}
    own = record.settings(settings.settings())
    readiness.consider(own)
    return own
