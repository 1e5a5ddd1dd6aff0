"""``pcsc_safe.configure()``: the only place where settings are changed.

:class:`pcsc_safe.policy.Settings` lists the settings: a new setting is a row there.  At a fork nothing changes: a child
inherits the settings, and can change its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Callable, Optional, Union

from ..errors import SettingsError
from ..policy import SETTINGS, Broker, Cards, Owner, Policy, Settings
from . import (
    connections,  # noqa: F401  # for guard_native, without any call of PC/SC
    gateways,
    handles,
    process,
    readiness,
    settings,
)
from .calls import Kind

if TYPE_CHECKING:
    from typing import Literal

    from typing_extensions import Self

__all__ = ["Configured", "configure"]


class Configured(Settings):
    """The settings in force after :func:`configure`; as a context manager, it restores what that call has changed.

    It raises SettingsError, and changes nothing, if this contradicts what other calls have changed since.
    """

    _restore: Callable[[], None]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()


if not TYPE_CHECKING:

    def configure(*, context=None, **given):
        unknown = given.keys() - SETTINGS.keys()
        if unknown:
            raise TypeError(f"configure() got an unexpected keyword argument {min(unknown)!r}")
        given = {name: value for name, value in given.items() if value is not None}
        former = settings.settings()
        changed = former.changed(**given)
        if context is not None:
            return _configure_context(context, changed, given)
        _check_share(changed)
        settings.replace(changed)
        before = {name: getattr(former, name) for name in given}
        return _configured(changed, lambda: settings.replace(settings.settings()._replace(**before).checked()))

    _rows = [f":param {name}: {row.description()}" for name, row in SETTINGS.items()]
    _rows += [
        ":param context: a context: the settings then apply only to it and its cards",
        ":return: the settings that are now in force; a ``with`` statement restores the former ones at its end",
        ":raises SettingsError: a setting can't have this value, alone or together with the others",
    ]
    configure.__doc__ = "\n".join(["Change settings of this process, or of one context.\n", *_rows])
else:  # what type checkers and the documentation know

    def configure(
        *,
        policy: Union[Policy, Literal["auto", "reestablish", "broker", "share", "raise", "invalid"], None] = None,
        cards: Union[Cards, Literal["auto", "reset", "reconnect"], None] = None,
        quiesce_timeout: Union[float, str, None] = None,
        broker: Union[Broker, Literal["on-fork", "always"], None] = None,
        broker_python: Optional[str] = None,
        owner: Union[Owner, Literal["parent", "child"], None] = None,
        guard_native: Union[bool, str, None] = None,
        spare_cards: Union[bool, str, None] = None,
        recover: Union[bool, str, None] = None,
        context: Any = None,
    ) -> Configured:
        """Change settings of this process, or of one context.

        You can call it at any time, in the parent and in a child.  It applies from the next PC/SC call on.  Settings
        that you leave out stay as they are.  In a ``with`` statement, the settings that the call has changed are
        restored at the end of the block:

            with pcsc_safe.configure(policy="raise"):
                ...

        Each enumeration is also a string: ``policy="raise"`` and ``policy=Policy.RAISE`` are the same.

        :param policy: what happens when a process first uses a context that it inherited: ``auto`` (default),
            ``reestablish``, ``broker``, ``share``, ``raise`` or ``invalid``.
        :param cards: what calls on an inherited card handle do.  ``auto`` (default): if the owner's session continues,
            the first call connects again and continues it; otherwise it returns SCARD_W_RESET_CARD.
            ``reset``: calls always return SCARD_W_RESET_CARD until SCardReconnect.  ``reconnect``: the first call
            connects again, unless the owner was in a transaction when the process forked.
        :param quiesce_timeout: the longest time that a fork waits for PC/SC calls of other threads to return, in
            seconds from 0 to 86400; 1 by default.
        :param broker: when a broker, a helper process, makes the PC/SC calls.  ``on-fork`` (default): in a forked
            process that can't use PC/SC itself, or has policy ``broker``; and, with ``recover``, in a process that
            can't list readers after a restart of pcscd.  ``always``: for all contexts that are established from now on.
            Set ``always`` before you import :mod:`pcsc_safe.scard` to keep the native library out of the process.
        :param broker_python: the path of the Python interpreter that runs brokers; ``""`` (default) is the one that
            runs this program.
        :param owner: which process owns the sessions after a fork: the ``parent`` (default), or the ``child``, as in
            :class:`pcsc_safe.handover`.
        :param guard_native: whether children that are forked from now on lose this process's connections to pcscd,
            including those of PKCS#11 modules and other native code; False by default.
        :param spare_cards: whether a card that a parent, child or sibling also uses is left alone by pyscard's defaults
            (disconnect() powers a card off, reconnect() resets it); True by default.
        :param recover: whether contexts are re-established after a restart of pcscd; False by default.  Their cards are
            treated like inherited cards; see ``cards``.
        :param context: a context, as SCardEstablishContext returned it: the settings then apply only to this context
            and its cards.  Only ``policy``, ``cards`` and ``recover`` can be set for a context.
        :return: the settings that are now in force: those of the context, if one was given.
        :raises SettingsError: a setting can't have this value, alone or together with the others; or ``context`` is not
            a context of this process; or ``policy="share"``, and a context of this process is in the native library.
        """
        raise NotImplementedError


def _configured(now: Settings, restore: Callable[[], object]) -> Configured:
    configured = Configured(*now)
    configured._restore = restore  # type: ignore[assignment]
    return configured


def _check_share(changed: Settings) -> None:
    """Refuse a policy ``share`` that would fail in every child.

    :param changed: the settings that will be in force.
    :raises SettingsError: this process has contexts that can't be shared.
    """
    here = process.current()
    for context in list(handles.contexts.values()):
        is_native = context.owner is here and not context.released and context.gateway is gateways.native
        if is_native and context.settings(changed).policy is Policy.SHARE:
            raise SettingsError(
                f"policy cannot be 'share' for the context of {context.established_at}, which is not in a broker",
                remedy="configure broker='always' and policy='share' before you establish it",
            )


def _configure_context(context: Any, changed: Settings, given: Iterable[str]) -> Configured:
    for name in given:
        if not SETTINGS[name].of_context:
            raise SettingsError(
                f"{name} cannot be set for one context", remedy="leave context out to configure the process"
            )
    record = handles.find(Kind.CONTEXT, context)
    if not isinstance(record, handles.Context) or record.released:
        raise SettingsError(
            "context is not an open context of this process",
            remedy="pass what SCardEstablishContext returned, or leave it out to configure the process",
        )
    settings.for_contexts = True
    before, changes = record.overrides, {name: getattr(changed, name) for name in given}
    record.overrides = {**before, **changes}
    try:
        _check_share(settings.settings())
    except SettingsError:
        record.overrides = before
        raise

    def restore() -> None:
        others = {name: value for name, value in record.overrides.items() if name not in changes}
        record.overrides = {**others, **{name: before[name] for name in changes if name in before}}

    in_force = record.settings(settings.settings())
    readiness.prepare_for(in_force)
    return _configured(in_force, restore)
