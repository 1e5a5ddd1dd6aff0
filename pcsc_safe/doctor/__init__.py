"""The doctor: examines this machine, this installation or a running program, and says what to do.

Findings are data; the page is one rendering of them.  Everything that uses PC/SC runs in a disposable process, so that
a pcscd that hangs, or a crash in a driver's library, doesn't affect the doctor.  The doctor looks at the user's cards
only through pcscd: SCardListReaders, and SCardGetStatusChange without waiting.  Only ``--touch-cards`` connects to
them, because even a shared connection powers a card up.

=========== ==========================================================================
module      responsibility
=========== ==========================================================================
_findings   what a finding is, and every key that one can have
_ask        runs a disposable process, and says how it ended
_tasks      what runs in the disposable processes
_machine    Python, pyscard, wrapt, libpcsclite, the settings
_pcscd      pcscd, who may use it, readers, cards
_fork       how forks are detected, what policy ``auto`` chooses, the broker
_probe      what a fork does to PC/SC here, and the hazards of the demo
_self_test  ``--self-test``: tries what pcsc_safe relies on; a report
_self_tasks what runs in the disposable processes for it
_process    ``--pid``: the connections to pcscd of a running program
_proc       what /proc says about processes
_sockets    where a process's Unix sockets lead, and who connected them
_view       the printed page
_command    ``python -m pcsc_safe doctor``
=========== ==========================================================================
"""
