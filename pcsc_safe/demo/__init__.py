"""A demonstration one can trust: every hazard on raw pyscard and on pcsc_safe, side by side.

Each run is a disposable process on a virtual PC/SC stack of its own, so a crash, a hang or a pcscd in a bad state
harms nobody.  The demo tells only what was observed: reports of the processes, and how they ended.

=========== ==========================================================================
module      responsibility
=========== ==========================================================================
hazards/    one module a hazard: the program that brings it about, and its judgement
_stage      what a hazard program stands on; runs in the disposable process
_run        one run, seen from outside: stack, process, watchdog
_judge      observations, and the sentence that may be said of them
_view       the live lines and the table
_command    ``python -m pcsc_safe demo``
=========== ==========================================================================
"""
