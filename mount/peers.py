"""Who asks at the control socket, and what not everybody may order."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import trio

from kvfs.catalog.rows import Inode
from kvfs.errors import NotPermitted
from kvfs.leasing.credentials import Credentials
from kvfs.leasing.leases import Holder


class Report(Protocol):
    """Sends a part of an answer, with descriptors of which the sender keeps his own."""

    async def __call__(
        self, progress: dict[str, Any], descriptors: Sequence[int] = (), /
    ) -> None: ...


class Answer(NamedTuple):
    """The result of a request, and descriptors that go with it; the sender keeps his own."""

    result: dict[str, Any]
    descriptors: Sequence[int] = ()


@dataclass(slots=True, eq=False)
class Peer:
    """One connection, and who is at its other end, as the kernel says."""

    uid: int
    gid: int
    groups: frozenset[int] = frozenset()
    hung_up: Callable[[], Awaitable[None]] = trio.sleep_forever
    holder: Holder = field(init=False)

    def __post_init__(self) -> None:
        self.holder = Holder(Credentials(self.uid, self.gid, self.groups), self.hung_up)

    @property
    def who(self) -> Credentials:
        """What the kernel says of him."""
        return self.holder.who

    def may(self, inode: Inode, wanted: int) -> bool:
        """Whether mode and owner of a file let him; the daemon's own user may all."""
        return self.uid == os.geteuid() or self.who.may(inode, wanted)

    def require_owner(self) -> None:
        """Raise NotPermitted for anybody but root and the daemon's own user."""
        if self.uid not in (0, os.geteuid()):
            raise NotPermitted("only root and the user of the daemon may do this")
