"""Take rights away from this process and its children for real: seccomp(2) filters, capabilities."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

PIPE2, PTRACE, FCNTL = 293, 101, 72  # x86-64
O_DIRECT = os.O_DIRECT
_CAP_SYS_PTRACE, _CAP_DAC_OVERRIDE = 19, 1
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _PR_SET_DUMPABLE = 24, 38, 22, 4
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _prctl(*arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(*(ctypes.c_ulong(a) for a in arguments)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def system_call(number: int, error: int, argument: int = 0, bits: int = 0) -> None:
    """Let a system call fail, always or only where an argument has one of these bits."""
    code = [(_LOAD, 0, 0, 0), (_EQUAL, 0, 3 if bits else 1, number)]
    if bits:
        code += [(_LOAD, 0, 0, 16 + 8 * argument), (_ANY_BIT, 0, 1, bits)]
    code += [(_RETURN, 0, 0, _ERRNO | error), (_RETURN, 0, 0, _ALLOW)]
    packed = b"".join(struct.pack("<HBBI", *each) for each in code)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(_Program(len(code), packed)), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")


def packet_pipes() -> None:
    system_call(PIPE2, errno.EINVAL, argument=1, bits=O_DIRECT)


def ptrace() -> None:
    system_call(PTRACE, errno.EPERM)


def capabilities() -> None:
    """Have the next exec end without CAP_SYS_PTRACE and CAP_DAC_OVERRIDE, for root too."""
    if os.geteuid() == 0:
        _prctl(_PR_CAPBSET_DROP, _CAP_SYS_PTRACE, 0, 0, 0)
        _prctl(_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, 0, 0, 0)


def being_read() -> None:
    """Be undumpable: without CAP_SYS_PTRACE nobody may look into this process (ptrace(2))."""
    _prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
