"""How a tier is: what the answers of its medium say of it. No I/O.

`state` is what may be asked of the tier: an offline one is asked nothing but probes. `refuses` is
why it takes no new bytes although it answers: reads go on.
"""

from __future__ import annotations

import errno
import logging
from typing import Literal

from kvfs.errors import MEDIUM_ERRNOS, TierDeadline, reason_of
from kvfs.incidents import Incidents
from kvfs.metrics import Counters

# A disk or a quota that is used up.
FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
ERRORS_BEFORE_OFFLINE = 3

State = Literal["online", "degraded", "offline"]
Refusal = Literal["", "read-only", "full", "failing"]


def is_of_medium(error: BaseException) -> bool:
    """Whether an error is the tier's rather than that of the one file or name."""
    return isinstance(error, OSError) and (
        error.errno in MEDIUM_ERRNOS or error.errno == errno.EROFS
    )


def is_full(error: BaseException) -> bool:
    """Whether a tier has no room for what it was asked to store."""
    return isinstance(error, OSError) and error.errno in FULL_ERRNOS


class Health:
    """Of one tier. Owned by the trio loop."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: State = "online"
        self.refuses: Refusal = ""
        self.last_error = ""
        # It was away, so renames may be promised to it: its names are not to be relied on.
        self.behind = False
        # The volume's, once there is one.
        self.incidents = Incidents(Counters())
        # Calls that were answered: what takes too long on a tier that answers others hangs not.
        self.answers = 0
        self._errors = 0

    @property
    def online(self) -> bool:
        return self.state != "offline"

    @property
    def shown(self) -> str:
        """The state in one word."""
        return self.state if self.state != "online" else self.refuses or "online"

    def worked(self) -> None:
        """A call was answered: errors in a row end here, but only a probe ends being offline."""
        self.answers += 1
        if self._errors and self.online:
            self._errors = 0
            self.state = "online"

    def failed(self, error: OSError) -> None:
        """A call was answered with an error. One of the medium counts: the third in a row takes
        the tier offline. A read-only one goes on being read."""
        if error.errno == errno.EROFS:
            self.refuse("read-only", error)
        elif is_of_medium(error):
            self._count(error)
        else:
            self.answers += 1

    def hung(self, error: TierDeadline, answers: int) -> None:
        """A call was not answered in time; `answers` there were when it began."""
        if self.answers == answers:
            self._count(error)
        else:
            self.incidents.counters.count("tier_errors", reason=error.reason, tier=self.name)

    def _count(self, error: OSError | TierDeadline) -> None:
        self._errors += 1
        self.last_error = str(error)
        self.incidents.counters.count("tier_errors", reason=reason_of(error), tier=self.name)
        offline = self._errors >= ERRORS_BEFORE_OFFLINE
        self._become("offline" if offline else "degraded", self.last_error)

    def refuse(self, refusal: Refusal, error: OSError) -> None:
        """It takes no new bytes until a probe says otherwise."""
        self.last_error = str(error)
        self.incidents.counters.count("tier_errors", reason=reason_of(error), tier=self.name)
        if self.refuses != refusal:
            self.refuses = refusal
            text = f"tier {self.name} is {refusal}, new blocks go elsewhere: {error}"
            self.incidents.note(
                "tier_changes", text, reason=refusal, tier=self.name, level=logging.WARNING
            )

    def probed(self, refusal: Refusal, error: OSError | None = None) -> None:
        """A probe was answered; whether the tier takes new bytes now."""
        before = self.shown
        self._errors = 0
        self.state, self.refuses = "online", refusal
        if error is not None:
            self.last_error = str(error)
        if self.shown != before:
            text = f"tier {self.name} is {self.shown} again"
            self.incidents.note(
                "tier_changes", text, reason=self.shown, tier=self.name, level=logging.INFO
            )

    def lost(self, reason: str) -> None:
        """Take it offline without counting: it is known not to be there."""
        self.last_error = reason
        self._become("offline", reason)

    def _become(self, state: State, reason: str) -> None:
        before, self.state = self.state, state
        self.behind |= state == "offline"
        if state != before:
            text = f"tier {self.name} is {state}: {reason}"
            self.incidents.note("tier_changes", text, reason=state, tier=self.name)
