"""The doctor: what this machine, this installation or a running program is like, and what to do about it.

Findings are data; the page is one rendering of them.  Whatever talks to PC/SC does so in a disposable process, so
neither a wedged pcscd nor a crash in a driver's library is the doctor's own.  The cards of the user are looked at from
the distance that pcscd keeps: SCardListReaders and SCardGetStatusChange without waiting.  Only ``--touch-cards``
connects to them, since even a shared connection powers a card up.

=========== ==========================================================================
module      responsibility
=========== ==========================================================================
_findings   what a finding is, and every key that one can have
_ask        a disposable process, and what is made of how it ended
_tasks      what runs in the disposable processes
_machine    Python, pyscard, wrapt, libpcsclite, the settings
_pcscd      pcscd, who may use it, readers, cards
_fork       how forks are noticed, what policy ``auto`` chooses, the broker
_probe      what a fork does to PC/SC here, and the hazards of the demo
_self_test  ``--self-test``: what pcsc_safe relies on, tried; a report
_self_tasks what runs in the disposable processes for it
_process    ``--pid``: the connections to pcscd of a running program
_proc       what /proc tells of processes
_sockets    where a process's Unix sockets lead, and who connected them
_view       the printed page
_command    ``python -m pcsc_safe doctor``
=========== ==========================================================================
"""
