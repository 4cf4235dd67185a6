"""Closes the network for the Python process that imports or runs this file, for good.

The course must run offline. Addresses of this machine stay open: Jupyter talks to its kernels.
"""

import sys
from typing import Any

OWN = (None, "", "localhost", "127.0.0.1", "::1", b"localhost", b"127.0.0.1", b"::1")
EVENTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


class NetworkClosed(ConnectionError):
    """Something asked for a host other than this machine."""


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in EVENTS:
        return
    host = arguments[0]
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        if not isinstance(address, tuple):  # a Unix socket's path
            return
        host = address[0]
    if host not in OWN:
        raise NetworkClosed(f"the network is closed while testing, but {host!r} was asked for")


# An audit hook sees every socket that Python code opens, and cannot be taken off again.
sys.addaudithook(refuse)
