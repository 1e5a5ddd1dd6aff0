"""How many reader slots a pcscd gets, and why that matters to its clients since pcsc-lite 2.5.

pcscd starts with two slots for readers.  It makes two more whenever they are full, and never removes one.  Since
pcsc-lite 2.5 its client library keeps an array of that size, one for the whole process, which never shrinks either.  A
process that has used a pcscd with four slots gets 0x8010001F (SCARD_E_UNSUPPORTED_FEATURE) from SCardListReaders,
SCardStatus and SCardGetStatusChange at a pcscd with two.  This happens with stacks that follow each other in a process.

So each stack gets as many slots as the largest stack before it in this process had, and :data:`LEAST` at least: stacks
of up to that many readers never differ.  Slots without a reader come from devices that pcscd adds and removes again
while it starts, before it serves anybody: devices of one name, and a last one of that name that can't be opened, with
which pcscd removes all of that name.  The last one costs nothing, each device before it 0.8 seconds.

Invariant: each start measures how many slots a stack has; this module only says how many to request.

At a fork: the child's library has the parent's array, so the child continues from the parent's maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

from ._errors import PcscStackError
from ._install import Installed

__all__ = ["HIDDEN", "LEAST", "Maximum", "hidden_devices", "matter", "maximum", "wanted"]

LEAST = 4
HIDDEN = "pcsc_safe hidden"
"""The friendly name of the devices that pcscd removes again."""

_PER_DEVICE = 2


@dataclass
class Maximum:
    """The largest number of slots of all stacks that were active in this process."""

    slots: int = 0

    def allow(self, slots: int, outer: int) -> None:
        """Note that a stack becomes active.

        :param slots: its slots; 0 if they don't matter.
        :param outer: the fewest slots of the stacks that are active now, to which PC/SC calls return later; 0 if none.
        :raises PcscStackError: PC/SC calls of this process could not use this stack, or could not return to another.
        """
        if slots and slots < self.slots:
            raise PcscStackError(
                f"this stack has room for {slots} readers only, and this process has used one with room for "
                f"{self.slots}: with pcsc-lite 2.5 and later it can't use the smaller one after that",
                remedy="restart() this stack before it is activated",
            )
        if outer and outer < slots:
            raise PcscStackError(
                f"the active stack has room for {outer} readers only, and this one for {slots}: with pcsc-lite 2.5 and "
                "later the smaller one can't be used again after that",
                remedy=f"start the outer one with {slots} readers, or this one with {outer} at most, or with "
                "activate=False for subprocesses that get its env",
            )
        self.slots = max(slots, self.slots)


maximum = Maximum()  # one per process, because libpcsclite's array is


def matter(installed: Installed) -> bool:
    """Whether clients of this pcscd remember its slots."""
    return installed.version_info >= (2, 5)


def wanted(devices: int) -> int:
    """How many slots a pcscd with so many devices should have."""
    return max(LEAST, devices * _PER_DEVICE, maximum.slots)


def hidden_devices(devices: int, slots: int) -> int:
    """How many devices pcscd must add and remove again, with the one that can't be opened; 0 if it has the slots."""
    return max(0, slots // _PER_DEVICE - devices)
