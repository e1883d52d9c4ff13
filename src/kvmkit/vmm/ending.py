"""How a VM ends: many threads may find a reason, the first one counts."""

import enum
import os
import threading


class Reason(enum.StrEnum):
    """Why a VM ended."""

    POWER_OFF = "power-off"
    RESET = "reset"
    EXIT = "exit"
    """The guest wrote its status to the debug-exit port."""
    PANIC = "panic"
    """A kernel panic, then a reset."""
    TRIPLE_FAULT = "triple-fault"
    HALTED = "halted"
    """HLT where no interrupt chip could wake it."""
    STOPPED = "stopped"
    """The client, or a SIGTERM, asked for it."""
    OUTPUT_CLOSED = "output-closed"
    """Nobody reads the console any more."""
    ENGINE = "engine"
    """The engine can't go on: KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_FAIL_ENTRY or a failing ioctl."""


class Ending:
    """Set once, by any thread or signal handler; `fileno` becomes readable then."""

    def __init__(self) -> None:
        """Nothing has ended yet."""
        self.reason: Reason | None = None
        self.detail = ""
        self._lock = threading.RLock()  # a signal handler may interrupt `set` on the same thread
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set(self, reason: Reason, detail: str = "") -> None:
        """End for `reason`, unless something else came first."""
        with self._lock:
            if self.reason is None:
                self.detail = detail
                self.reason = reason
                os.eventfd_write(self._fd, 1)

    def __bool__(self) -> bool:
        """Whether it is set."""
        return self.reason is not None

    def fileno(self) -> int:
        """A descriptor that is readable once it is set."""
        return self._fd

    def close(self) -> None:
        """Release the descriptor."""
        os.close(self._fd)
