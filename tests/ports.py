"""Where can ranks meet?"""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A port that stays free until it is bound: below those that the kernel hands to outgoing connections (32768 on)."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
