"""Exit codes that say more than success or failure; imports nothing large."""

from __future__ import annotations

import signal

# SIGTERM came, and what was to be kept is kept.
EXIT_TERMINATED = 128 + signal.SIGTERM
# Of a process that SIGTERM ended: one that listened, and one that did not.
TERMINATED = (EXIT_TERMINATED, -signal.SIGTERM)
