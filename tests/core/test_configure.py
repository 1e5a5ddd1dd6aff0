"""``configure()``: how it changes, restores and refuses settings."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
from calling import Calling
from conftest import ECHO, Session
from forking import in_child

import pcsc_safe
from pcsc_safe import Broker, Cards, Policy, SettingsError, configure, settings
from pcsc_safe import scard as safe
from pcsc_safe._core import settings as process_settings
from pcsc_safe.policy import Settings


def test_a_block_puts_back_what_it_changed() -> None:
    """The end of a ``with`` block restores what it changed, even after an exception, and nothing else."""
    configure(cards="reset")
    with contextlib.suppress(ZeroDivisionError), configure(policy="raise", cards=Cards.RECONNECT) as inside:
        assert (inside.policy, inside.cards) == (Policy.RAISE, Cards.RECONNECT)
        assert inside == settings()
        configure(quiesce_timeout=5)
        with configure(policy="invalid"):
            assert settings().policy is Policy.INVALID
        assert settings().policy is Policy.RAISE
        raise ZeroDivisionError
    assert (settings().policy, settings().cards, settings().quiesce_timeout) == (Policy.AUTO, Cards.RESET, 5.0)


def test_a_block_that_cannot_put_back_what_it_changed() -> None:
    """The end of a block raises an error if the former settings contradict what was changed in the block."""

    def in_block() -> None:
        with configure(broker="always"):
            configure(policy="share")

    def child() -> Any:
        process_settings.replace(Settings())
        with pytest.raises(SettingsError, match="policy cannot be 'share' while broker is 'on-fork'"):
            in_block()
        return settings().policy, settings().broker

    assert in_child(child) == (Policy.SHARE, Broker.ALWAYS)


def test_two_threads_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that reads the environment for the first time doesn't undo what another thread configures."""

    def slowly() -> Settings:
        monkeypatch.setattr(process_settings, "from_environment", Settings)
        Calling(lambda: configure(policy="raise")).answer()
        return Settings()

    monkeypatch.setattr(process_settings, "from_environment", slowly)
    assert settings().policy is settings().policy is Policy.RAISE


def test_a_call_without_a_block_stays() -> None:
    """A call without a ``with`` block has a lasting effect, and returns the settings."""
    assert configure(policy="raise") == settings()
    assert settings().policy is Policy.RAISE


def test_a_block_for_one_context(session: Session) -> None:
    """The end of a block restores the context's own settings, or that it has none."""
    configure(cards="reset", context=session.context)

    def answers() -> Any:
        return in_child(session.transmit, ECHO)[0]

    with configure(policy="invalid", cards="reconnect", context=session.context) as inside:
        assert inside.policy is Policy.INVALID
        assert answers() == safe.SCARD_E_INVALID_HANDLE
    assert answers() == safe.SCARD_W_RESET_CARD
    assert settings().policy is Policy.AUTO


@pytest.mark.native
def test_share_comes_too_late(session: Session) -> None:
    """A context in this process can't be shared: configure() says so, and where the context was established."""
    where = re.escape(session.context.established_at)
    before = settings()
    with pytest.raises(
        SettingsError, match=f"policy cannot be 'share' for the context of {where}, which is not in a b"
    ):
        configure(broker="always", policy="share")
    assert settings() == before
    configure(broker=Broker.ALWAYS)
    with pytest.raises(SettingsError, match="before you establish it"):
        configure(policy=Policy.SHARE, context=session.context)
    assert session.transmit(ECHO)[0] == safe.SCARD_S_SUCCESS
    configure(policy="raise", context=session.context)  # never shared
    assert configure(policy="share").policy is Policy.SHARE


@pytest.mark.native
def test_share_in_a_child(session: Session) -> None:
    """A child may set policy ``share``: what it inherited is its parent's, and it shares what it establishes itself."""

    def child() -> Any:
        return configure(broker="always", policy="share").policy

    assert in_child(child) is Policy.SHARE


def test_what_is_refused(session: Session) -> None:
    """The error for each wrong value says what to do, also for a setting that no single context can have."""
    with pytest.raises(SettingsError, match="policy cannot be 'bogus'; use one of 'auto', 'reestablish'"):
        configure(policy="bogus")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="owner cannot be set for one context; leave context out to configure the"):
        configure(owner="child", context=session.context)
    with pytest.raises(
        SettingsError, match="context is not an open context of this process; pass what SCardEstablishC"
    ):
        configure(policy="raise", context=session.card)
    with pytest.raises(TypeError, match="unexpected keyword argument 'polcy'"):
        configure(polcy="raise")  # type: ignore[call-arg]


def test_install_takes_settings() -> None:
    """install() configures its settings first. A wrong setting changes nothing in pyscard."""
    import smartcard.scard._scard as native

    before = native.SCardTransmit
    with pytest.raises(SettingsError):
        pcsc_safe.install(policy="bogus")  # type: ignore[arg-type]
    assert native.SCardTransmit is before
    try:
        pcsc_safe.install(policy="raise", cards=Cards.RESET)
        assert (settings().policy, settings().cards) == (Policy.RAISE, Cards.RESET)
        assert native.SCardTransmit is not before
        pcsc_safe.install()
        assert settings().policy is Policy.RAISE
    finally:
        pcsc_safe.uninstall()
    assert native.SCardTransmit is before
