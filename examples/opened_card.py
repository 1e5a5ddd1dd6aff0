"""Opens the card when this module is imported; for `multiprocessing_sign`.

What it shows: a module that a fork server preloads may open the card, and so may one that the parent of all workers
imports.
"""

import os
import sys

import piv

try:
    signer = piv.Signer(piv.pin())
except piv.CardError as error:
    sys.exit(f"opened_card.py: {error}")
print(f"process {os.getpid()} opened the card", file=sys.stderr)
