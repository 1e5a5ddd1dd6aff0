"""A demonstration that shows every hazard on raw pyscard and on pcsc_safe, side by side.

Each run is a disposable process on a separate virtual PC/SC stack, so a crash, a hang or a pcscd in a bad state affects
nothing else.  The demo reports only what was observed: reports of the processes, and how they ended.

=========== ==========================================================================
module      responsibility
=========== ==========================================================================
hazards/    one module for each hazard: the program that causes it, and its judgement
_stage      what a hazard program uses; runs in the disposable process
_run        one run, observed from outside: stack, process, watchdog
_judge      turns observations into a verdict and a sentence
_view       the live lines and the table
_command    ``python -m pcsc_safe demo``
=========== ==========================================================================
"""
