"""Keeping to this host what only its own processes say to each other."""

from __future__ import annotations

import os
import socket

NAMES = ("lo", "lo0")


def gloo_on_loopback() -> dict[str, str]:
    """The variable for processes on one host alone: Gloo's ports take what anybody sends.

    None where the user chose an interface.
    """
    names = [name for _, name in socket.if_nameindex() if name in NAMES]
    chosen = "GLOO_SOCKET_IFNAME" in os.environ
    return {"GLOO_SOCKET_IFNAME": names[0]} if names and not chosen else {}
