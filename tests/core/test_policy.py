"""The verdict on a call with an inherited handle: the table of DESIGN section 3, as rows."""

from __future__ import annotations

import pytest

import pcsc_safe.policy
from pcsc_safe.errors import SettingsError
from pcsc_safe.policy import (
    Broker,
    Cards,
    Policy,
    Role,
    Settings,
    Verdict,
    Way,
    choose_way,
    decide,
    from_environment,
    native_works_after_fork,
)

OWN = (Policy.AUTO, Policy.REESTABLISH, Policy.BROKER)


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("cards", Cards)
@pytest.mark.parametrize("card", [False, True])
@pytest.mark.parametrize("in_transaction", [False, True])
def test_cleanup_and_cancel_never_depend_on_the_policy(
    policy: Policy, cards: Cards, card: bool, in_transaction: bool
) -> None:
    """Cleanup forgets the handle and SCardCancel succeeds, whatever is configured."""
    settings = Settings(policy, cards)
    assert decide(settings, Role.CLEANUP, card=card, in_transaction=in_transaction) is Verdict.FORGET
    assert decide(settings, Role.CANCEL, card=card, in_transaction=in_transaction) is Verdict.SUCCEED


@pytest.mark.parametrize(
    ("policies", "cards", "role", "card", "in_transaction", "expected"),
    [
        ((Policy.RAISE,), Cards, Role.USE, False, False, Verdict.RAISE),
        ((Policy.RAISE,), Cards, Role.USE, True, True, Verdict.RAISE),
        ((Policy.RAISE,), Cards, Role.RECONNECT, True, False, Verdict.RAISE),
        ((Policy.RAISE,), Cards, Role.VALIDITY, False, False, Verdict.INVALID),
        ((Policy.INVALID,), Cards, Role.USE, False, False, Verdict.INVALID),
        ((Policy.INVALID,), Cards, Role.USE, True, False, Verdict.INVALID),
        ((Policy.INVALID,), Cards, Role.RECONNECT, True, False, Verdict.INVALID),
        ((Policy.INVALID,), Cards, Role.VALIDITY, False, False, Verdict.INVALID),
        (OWN, Cards, Role.USE, False, False, Verdict.REESTABLISH),
        (OWN, Cards, Role.VALIDITY, False, False, Verdict.REESTABLISH),
        (OWN, Cards, Role.RECONNECT, True, False, Verdict.RECONNECT),
        (OWN, Cards, Role.RECONNECT, True, True, Verdict.RECONNECT),
        (OWN, (Cards.RESET,), Role.USE, True, False, Verdict.RESET),
        (OWN, (Cards.RESET,), Role.USE, True, True, Verdict.RESET),
        (OWN, (Cards.AUTO,), Role.USE, True, False, Verdict.CONTINUE),
        (OWN, (Cards.AUTO,), Role.USE, True, True, Verdict.CONTINUE),
        (OWN, (Cards.RECONNECT,), Role.USE, True, False, Verdict.CONNECT),
        (OWN, (Cards.RECONNECT,), Role.USE, True, True, Verdict.RESET),
    ],
)
def test_the_table(policies, cards, role, card, in_transaction, expected) -> None:  # type: ignore[no-untyped-def]
    """Each row of the contract gives its verdict."""
    for policy in policies:
        for what in cards:
            assert decide(Settings(policy, what), role, card=card, in_transaction=in_transaction) is expected


def test_only_macos_forbids_the_native_library_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """One function checks the platform."""
    for platform, works in (("darwin", False), ("linux", True), ("freebsd14", True)):
        monkeypatch.setattr(pcsc_safe.policy, "PLATFORM", platform)
        assert native_works_after_fork() is works


@pytest.mark.parametrize("native_works", [True, False])
@pytest.mark.parametrize("forked", [True, False])
@pytest.mark.parametrize("when", Broker)
@pytest.mark.parametrize("what", Policy)
def test_the_way_to_pcsc(what: Policy, when: Broker, forked: bool, native_works: bool) -> None:
    """A broker is used always, or where it is necessary; otherwise the library is called natively, or not at all."""
    way = choose_way(Settings(policy=what, broker=when), forked=forked, native_works=native_works)
    if when is Broker.ALWAYS or (forked and what is Policy.BROKER):
        assert way is Way.BROKER
    elif native_works:
        assert way is Way.NATIVE
    else:
        assert way is (Way.NONE if what is Policy.REESTABLISH else Way.BROKER)


def test_the_environment_sets_the_defaults() -> None:
    """PCSC_SAFE_* give the settings. An empty variable counts as unset."""
    assert from_environment({}) == Settings(Policy.AUTO, Cards.AUTO)
    assert from_environment({"PCSC_SAFE_POLICY": "", "PCSC_SAFE_CARDS": "reconnect"}).cards is Cards.RECONNECT
    assert from_environment({"PCSC_SAFE_POLICY": "raise"}).policy is Policy.RAISE
    assert from_environment({"PCSC_SAFE_QUIESCE_TIMEOUT": "0.25"}).quiesce_timeout == 0.25
    for value in ("1", "true", "Yes", "on"):
        assert from_environment({"PCSC_SAFE_RECOVER": value}).recover is True
    for value in ("0", "FALSE", "no", "off", ""):
        assert from_environment({"PCSC_SAFE_RECOVER": value}).recover is False


def test_a_variable_that_makes_no_sense_is_refused_by_name() -> None:
    """The error names the variable, its value and the valid values."""
    with pytest.raises(SettingsError) as caught:
        from_environment({"PCSC_SAFE_POLICY": "rase"})
    assert str(caught.value) == (
        "PCSC_SAFE_POLICY cannot be 'rase'; use one of 'auto', 'reestablish', 'broker', 'share', 'raise', 'invalid'"
    )


WRONG = [
    {"policy": "always"},
    {"cards": "keep"},
    {"cards": 7},
    {"policy": ["raise"]},
    {"broker": "never"},
    {"broker_python": 3},
    {"recover": "maybe"},
    {"recover": 2},
    *({"quiesce_timeout": value} for value in (-1, "soon", float("nan"), float("inf"), True, [1])),
]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_configure_refuses_by_name_and_changes_nothing(wrong) -> None:  # type: ignore[no-untyped-def]
    """The error names the setting with an invalid value. All settings stay as they were."""
    pcsc_safe.configure(policy="raise", cards="reconnect")
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} cannot be .*; use (one of|a number of sec|the path)"):
        pcsc_safe.configure(**wrong)
    assert pcsc_safe.settings() == Settings(Policy.RAISE, Cards.RECONNECT)


def test_configure_leaves_what_is_not_given() -> None:
    """configure() changes only the settings that are given, by value or by enum member."""
    assert pcsc_safe.configure(cards=Cards.RECONNECT) == Settings(Policy.AUTO, Cards.RECONNECT)
    assert pcsc_safe.configure(policy="invalid") == Settings(Policy.INVALID, Cards.RECONNECT)
    assert pcsc_safe.settings() == Settings(Policy.INVALID, Cards.RECONNECT)
    with pytest.raises(TypeError):
        pcsc_safe.configure(polcy="raise")  # type: ignore[call-arg]


def test_configure_wants_a_context_of_ours() -> None:
    """Settings for one context need a context of pcsc_safe."""
    with pytest.raises(SettingsError, match="context is not an open context of this process"):
        pcsc_safe.configure(policy="raise", context=4711)
