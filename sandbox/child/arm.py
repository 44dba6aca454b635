"""Child side: arm a process so that a fatal signal holds it, and so that it dies with its supervisor."""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import mmap
import os
import platform
import select
import signal
import sys
import threading
from types import FrameType
from typing import Any

FATAL = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)
_SA_SIGINFO, _SA_ONSTACK = 4, 0x08000000
_ALTSTACK_SIZE = 128 * 1024  # a frame with AVX-512 and AMX state takes 11 KiB, faulthandler little more
_F_SETSIG = 10
_PR_SET_DUMPABLE, _PR_SET_PTRACER = 4, 0x59616D61
# `crumplezone exec` puts others in the place of these, see exec_hook.py.
_enable = getattr(faulthandler.enable, "__wrapped__", faulthandler.enable)
_disable = getattr(faulthandler.disable, "__wrapped__", faulthandler.disable)
_OPTIONS = {"all_threads": True}
if sys.version_info >= (3, 14):
    # It would walk the C stack by libgcc's unwinder, from within the signal's handler: that takes locks, and
    # may fault on a corrupt stack. pystack does it from outside, while the process is held.
    _OPTIONS["c_stack"] = False


class _SigAction(ctypes.Structure):  # glibc's struct sigaction on x86-64 and aarch64
    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class _StackT(ctypes.Structure):
    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


class _Altstack(threading.local):
    """Kept as long as its thread has Python state."""

    memory: mmap.mmap | None = None


_altstack = _Altstack()


def _give_altstack(_frame: FrameType, _event: str, _argument: Any) -> None:
    """As a profile function: runs once, in a new Python thread, before its first call."""
    sys.setprofile(None)
    _altstack.memory = memory = mmap.mmap(-1, _ALTSTACK_SIZE)
    stack = _StackT(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 0, _ALTSTACK_SIZE)
    ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None)


def _stand_behind(libc: ctypes.CDLL, *, park: bool) -> None:
    """Let pause() handle fatal signals where faulthandler does not, or the kernel as if nothing were here.

    Before it writes anything, faulthandler's handler restores what there was before it: with SIG_DFL, a
    second thread that faults would end the process before the supervisor can stop it. Afterwards it raises
    the signal again. Every signal is blocked in there, so nothing makes pause() return.
    """
    handler = ctypes.cast(libc.pause, ctypes.c_void_p).value if park else None
    action = _SigAction(handler=handler, flags=_SA_ONSTACK)
    ctypes.memset(ctypes.byref(action, _SigAction.mask.offset), 0xFF, _SigAction.mask.size)
    for signum in FATAL:
        libc.sigaction(int(signum), ctypes.byref(action), None)


def hold_on_fault(fault_fd: int, tracer: int, *, park: bool = True) -> None:
    """Route faulthandler into a one-slot packet pipe.

    Its first write wakes the supervisor, its second blocks until the supervisor reads: the crashed thread
    is held inside the handler, with the kernel's signal frame above it on the stack. When all is written it
    is parked: it waits to be killed.

    Args:
        fault_fd: Write end of the pipe.
        tracer: Process id of the supervisor, which may look into this process.
        park: False: it dies of its signal instead, which its parent sees then. A second thread that faults
            ends the process too.
    """
    # Whatever thread of the supervisor's has started this, its mask was inherited. A fault whose signal is
    # blocked ends the process at once (signal(7)).
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FATAL)
    libc = ctypes.CDLL(None, use_errno=True)
    known_machine = platform.machine() in {"x86_64", "aarch64"}
    # PYTHONFAULTHANDLER enables it too; enabled a second time it would not install its handlers again.
    _disable()
    if known_machine:
        _stand_behind(libc, park=park)
    _enable(file=fault_fd, **_OPTIONS)
    if known_machine:
        # Kernels copy siginfo into the signal frame only with SA_SIGINFO, which CPython does not set.
        for signum in FATAL:
            action = _SigAction()
            if libc.sigaction(int(signum), None, ctypes.byref(action)) == 0 and action.handler:
                action.flags |= _SA_SIGINFO | _SA_ONSTACK
                libc.sigaction(int(signum), ctypes.byref(action), None)
    # faulthandler gives an alternate stack to this thread only; without one a stack overflow cannot be held.
    if threading.getprofile() is None:
        threading.setprofile(_give_altstack)
    # Under Yama's ptrace_scope=1 only a named tracer and its children may look; EINVAL without Yama.
    libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(tracer), 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(1), 0, 0, 0)


def stand_down() -> None:
    """Die of a fatal signal as if nothing had been armed."""
    _disable()
    _stand_behind(ctypes.CDLL(None), park=False)


def die_with(parent_fd: int) -> None:
    """Have the kernel send SIGKILL when the last write end of this pipe closes.

    Unlike PR_SET_PDEATHSIG this does not follow the thread that spawned us, and unlike a watching thread
    it works while the process is stopped or stuck in native code (O_ASYNC, F_SETSIG: fcntl(2)).
    """
    fcntl.fcntl(parent_fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(parent_fd, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(parent_fd, fcntl.F_SETFL, fcntl.fcntl(parent_fd, fcntl.F_GETFL) | os.O_ASYNC)
    poller = select.poll()
    poller.register(parent_fd, 0)  # POLLHUP is always reported
    if poller.poll(0):  # it closed before the signal was armed
        os.kill(os.getpid(), signal.SIGKILL)
