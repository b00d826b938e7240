"""The kernel's clock: when bytes arrived and left as the kernel saw it, and an alarm that rings on time.

Knows ``SO_TIMESTAMPING`` (Linux ``Documentation/networking/timestamping.rst``; constants of
``include/uapi/linux/net_tstamp.h`` and ``errqueue.h``) and ``timerfd_create(2)``. Leaves sockets, and what the
bytes mean, to others. Where a kernel has no stamps (gVisor, other systems) everything here says so and nothing fails.

The kernel stamps by ``CLOCK_REALTIME``; all instants of a trace are ``CLOCK_MONOTONIC``. The distance between the two
is taken anew at every wake-up, because time daemons move it.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
import time
from collections.abc import Sequence

TX_SOFTWARE, RX_SOFTWARE, SOFTWARE, OPT_ID, OPT_TSONLY = 1 << 1, 1 << 3, 1 << 4, 1 << 7, 1 << 11
SO_TIMESTAMPING = 37
"""On every architecture that vLLM runs on (``include/uapi/asm-generic/socket.h``); also the type of the message."""

ANCILLARY_BYTES = socket.CMSG_SPACE(48)
"""Room for one ``struct scm_timestamping``: three ``timespec``, of which the first is the software stamp."""

_ERROR_ROOM = 512
_ORIGIN_TIMESTAMPING = 4
_STAMP = struct.Struct("@qq")
_SENT_KEY = struct.Struct("=IBBBBII")  # struct sock_extended_err: errno, origin, type, code, pad, info, data
_NS_PER_S = 1_000_000_000
_SLACK_NS = 100_000
_STEADY_NS = 50_000

Ancillary = Sequence[tuple[int, int, bytes]]
"""What ``recvmsg`` returns beside the bytes: (level, type, content)."""


def request_stamps(connected: socket.socket) -> None:
    """Ask the kernel to stamp what a connection receives from now on, and what it sends, as far as it can.

    Nothing happens where it cannot; the first byte sent after this is number 0 of the stamps of :func:`sent_stamp`.

    :param connected: all bytes sent so far must have been acknowledged, which an answer to them shows.
    """
    if struct.calcsize("l") != struct.calcsize("q") or not sys.platform.startswith("linux"):
        return  # another layout of the stamps, or none at all
    receive = RX_SOFTWARE | SOFTWARE
    for flags in (receive | TX_SOFTWARE | OPT_TSONLY | OPT_ID, receive):
        try:
            connected.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, flags)
        except OSError:
            continue
        return


class KernelTime:
    """Turns stamps of the kernel into ``CLOCK_MONOTONIC``, and refuses those that cannot be true."""

    __slots__ = ("_offset_ns", "_taken_ns")

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._taken_ns = 0
        self.follow()

    def follow(self) -> int:
        """Look at both clocks; call it after each wake-up. Returns ``CLOCK_MONOTONIC`` now."""
        before_ns, real_ns, after_ns = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        # A thread that lost its CPU between the readings would move every stamp; the old distance is better then.
        if after_ns - before_ns < _STEADY_NS or after_ns - self._taken_ns > _NS_PER_S:
            self._offset_ns = real_ns - (before_ns + after_ns) // 2
            self._taken_ns = after_ns
        return after_ns

    def arrival(self, ancillary: Ancillary, floor_ns: int, now_ns: int) -> int | None:
        """Return when the last byte that was read arrived, or ``None`` without a believable stamp.

        :param floor_ns: it cannot have come before. :param now_ns: nor after.
        """
        for level, kind, content in ancillary:
            if kind == SO_TIMESTAMPING and level == socket.SOL_SOCKET:
                seconds, rest_ns = _STAMP.unpack_from(content)
                stamp_ns: int = seconds * _NS_PER_S + rest_ns - self._offset_ns
                if floor_ns <= stamp_ns <= now_ns:
                    return stamp_ns
                # Both clocks are read a moment apart, so a stamp may lie a little outside.
                if floor_ns - _SLACK_NS <= stamp_ns <= now_ns + _SLACK_NS:
                    return min(max(stamp_ns, floor_ns), now_ns)
        return None

    def sent_stamp(self, connection: socket.socket, last_byte: int, floor_ns: int) -> int | None:
        """Empty a connection's error queue; return when a byte was given to the network device, if that was in it.

        :param last_byte: number of the byte since :func:`request_stamps`.
        :param floor_ns: it cannot have left before.
        """
        found = None
        while True:
            try:
                _, ancillary, _, _ = connection.recvmsg(0, _ERROR_ROOM, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
            except OSError:
                return found
            if last_byte & 0xFFFF_FFFF in _sent_keys(ancillary):
                found = self.arrival(ancillary, floor_ns, time.monotonic_ns())


def _sent_keys(ancillary: Ancillary) -> list[int]:
    """The numbers of the bytes that stamps from the error queue speak of."""
    keys = []
    for _level, kind, content in ancillary:
        if kind != SO_TIMESTAMPING and len(content) >= _SENT_KEY.size:
            _, origin, _, _, _, _, key = _SENT_KEY.unpack_from(content)
            if origin == _ORIGIN_TIMESTAMPING:
                keys.append(key)
    return keys


class _TimerSpec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class Alarm:
    """A file that becomes readable at an instant of ``CLOCK_MONOTONIC``, to the precision of the kernel's timers.

    ``epoll`` alone counts in milliseconds. :mod:`os` has the same calls from Python 3.13 on.
    """

    _ABSOLUTE = 1  # TFD_TIMER_ABSTIME

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._set_ns = 0
        # TFD_NONBLOCK and TFD_CLOEXEC are defined as these (bits/timerfd.h).
        self._fd: int = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "timerfd_create")

    def fileno(self) -> int:
        """Return the file to wait for."""
        return self._fd

    def ring_at(self, at_ns: int) -> None:
        """Set the alarm; it replaces the one before, whether that has rung or not. 0 for never."""
        if at_ns == self._set_ns:
            return
        self._set_ns = at_ns
        spec = _TimerSpec(0, 0, *divmod(at_ns, _NS_PER_S))
        if self._libc.timerfd_settime(self._fd, self._ABSOLUTE, ctypes.byref(spec), None) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "timerfd_settime")

    def close(self) -> None:
        """Give the file back."""
        os.close(self._fd)
