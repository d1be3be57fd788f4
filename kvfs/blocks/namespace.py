"""Names: lookup, mkdir, rmdir, unlink, rename and listing.

A change that touches only the tier called on the loop happens without a checkpoint. One that needs
another tier is committed with an intent first, and claims its paths while it waits.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Container
from itertools import islice

from kvfs import failpoints, layout
from kvfs.blocks.blocks import Blocks
from kvfs.catalog.rows import ROOT_INODE, BlockState, Inode, Intent, Kind, Replica
from kvfs.errors import (
    BlockExists,
    BlockNotFound,
    FilesystemError,
    NotPermitted,
    RecordBehind,
    TierOffline,
    is_shortage,
    reason_of,
)
from kvfs.tiers.backing import sync_block
from kvfs.tiers.health import is_full, is_of_medium
from kvfs.tiers.tier import Tier, give_owner
from kvfs.volume.replicas import Replicas, meets
from kvfs.volume.volume import Volume


class Namespace:
    """Owned by the trio loop."""

    def __init__(self, volume: Volume, replicas: Replicas, blocks: Blocks) -> None:
        self.volume = volume
        self.replicas = replicas
        self.blocks = blocks
        self._changed_ns: dict[int, int] = {}

    # --- reading

    def lookup(self, parent: int, name: bytes) -> Inode | None:
        """The inode of a name; None when there is none."""
        if name == b".":
            return self.get(parent)
        if name == b"..":
            entry = self.volume.catalog.entry(parent)
            return self.get(entry[0] if entry else ROOT_INODE)
        inode = self.volume.catalog.lookup(parent, name)
        return self.current(inode) if inode else None

    def get(self, number: int) -> Inode | None:
        """The attributes of an inode, also of one without a name that is still open."""
        inode = self.volume.catalog.get(number)
        if inode is None:
            block = self.replicas.open_blocks.get(number)
            inode = block.orphan if block else None
        return self.current(inode) if inode else None

    def current(self, inode: Inode) -> Inode:
        """The row with what is not in the catalog yet."""
        if inode.kind == Kind.DIRECTORY:
            changed_ns = self._changed_ns.get(inode.id)
            if changed_ns is None:
                return inode
            return inode._replace(mtime_ns=changed_ns, ctime_ns=changed_ns)
        block = self.replicas.open_blocks.get(inode.id)
        return block.attributes(inode) if block else inode

    def children(self, directory: int, after: int, limit: int) -> list[tuple[bytes, Inode]]:
        """Entries of a directory in the order of their inodes."""
        rows = self.volume.catalog.children(directory, after, limit)
        return [(name, self.current(inode)) for name, inode in rows]

    def directory_changed(self, directory: int) -> None:
        """Its times, written to the catalog with the next flush."""
        self._changed_ns[directory] = int(self.volume.clock.now_s() * 1e9)

    def directory_times_set(self, directory: int) -> None:
        """Somebody chose its times: those of its last change are no longer to be written."""
        self._changed_ns.pop(directory, None)

    def directory_times(self, most: int) -> list[tuple[int, int]]:
        """What the flush writes, up to `most` directories."""
        return list(islice(self._changed_ns.items(), most))

    def directory_times_flushed(self, written: list[tuple[int, int]]) -> None:
        """They are in the catalog."""
        for directory, _ in written:
            self._changed_ns.pop(directory, None)

    # --- directories

    async def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Inode:
        """A new directory; made on the fastest tier too, so that a walk finds it."""
        catalog = self.volume.catalog
        layout.check_name(name)
        path = await self.blocks.paths.free_name(parent, name)
        self.blocks.paths.check_length(path)
        if catalog.lookup(parent, name) is not None:
            raise BlockExists(os.fsdecode(path))
        with catalog.transaction("mkdir"):
            number = catalog.insert_inode(
                Kind.DIRECTORY, stat.S_IMODE(mode), uid, gid, int(self.volume.clock.now_s() * 1e9)
            )
            catalog.link(parent, name, number)
        self.volume.directories += 1
        self.directory_changed(parent)
        first = self.volume.tiers[0]
        try:
            await first.run(_make_directory, first, path, mode, uid, gid)
            failpoints.hit("mkdir.made")
        except (OSError, TierOffline) as error:
            if is_of_medium(error) or is_full(error) or isinstance(error, TierOffline):
                # A walk does not find it while it is empty: nothing else.
                self.volume.counters.count(
                    "mirrors_failed", reason=reason_of(error), tier=first.name
                )
                return self._directory(number)
            with catalog.transaction("undo_mkdir"):
                catalog.delete(number)
            self.volume.directories -= 1
            raise
        return self._directory(number)

    def _directory(self, number: int) -> Inode:
        inode = self.volume.catalog.get(number)
        assert inode is not None, "a directory that was just made"
        return inode

    async def rmdir(self, parent: int, name: bytes) -> Inode:
        """Remove an empty directory; the row it had."""
        catalog = self.volume.catalog
        self._refuse_reserved(name)
        path = await self.blocks.paths.free_name(parent, name)
        inode = self._existing(parent, name)
        if inode.kind != Kind.DIRECTORY:
            raise FilesystemError(errno.ENOTDIR)
        if catalog.has_children(inode.id):
            raise FilesystemError(errno.ENOTEMPTY)
        with catalog.transaction("rmdir"):
            catalog.delete(inode.id)
        self.volume.directories -= 1
        self._changed_ns.pop(inode.id, None)
        self.directory_changed(parent)
        first = self.volume.tiers[0]
        # A left-over there is fsck's matter; the name is gone either way.
        with self.volume.overlook("mirrors_failed", first):
            await first.run(first.remove_directory, path)
        failpoints.hit("rmdir.removed")
        return inode

    # --- blocks

    async def unlink(self, parent: int, name: bytes) -> Inode:
        """Remove a block; the row it had."""
        self._refuse_reserved(name)
        path = await self.blocks.paths.free_name(parent, name)
        inode = self._existing(parent, name)
        if inode.kind == Kind.DIRECTORY:
            raise FilesystemError(errno.EISDIR)
        self.replicas.remove_block(self.current(inode), path)
        self.directory_changed(parent)
        self.volume.counters.count("unlinks")
        self.volume.settling_due.set()
        return inode

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, *, replace: bool = True
    ) -> tuple[Inode, Inode | None]:
        """Give a block or directory another name: (what moved, what it replaced).

        The catalog is committed first, with an intent for each tier; recovery finishes it forward.
        """
        layout.check_name(new_name)
        self._refuse_reserved(name)
        while True:
            old = self.blocks.paths.of_name(parent, name)
            new = self.blocks.paths.of_name(new_parent, new_name)
            if self.volume.claims.is_free(old, new):
                break
            await self.volume.claims.wait(old, new)
        self.blocks.paths.check_length(new)
        inode = self._existing(parent, name)
        target = self.volume.catalog.lookup(new_parent, new_name)
        if target is not None:
            if not replace:
                raise BlockExists(os.fsdecode(new))
            if target.id == inode.id:
                return inode, None
            self._check_replaceable(inode, target)
        if inode.kind == Kind.DIRECTORY and layout.is_within(new, old):
            raise FilesystemError(errno.EINVAL, "a directory cannot move below itself")
        self.directory_changed(parent)
        self.directory_changed(new_parent)
        if inode.kind == Kind.DIRECTORY:
            await self._rename_directory(inode, target, old, (new_parent, new_name, new))
        else:
            await self._rename_block(inode, target, old, (new_parent, new_name, new))
        return inode, target

    def _check_replaceable(self, inode: Inode, target: Inode) -> None:
        if target.kind == Kind.DIRECTORY:
            if inode.kind != Kind.DIRECTORY:
                raise FilesystemError(errno.EISDIR)
            if self.volume.catalog.has_children(target.id):
                raise FilesystemError(errno.ENOTEMPTY)
        elif inode.kind == Kind.DIRECTORY:
            raise FilesystemError(errno.ENOTDIR)

    async def _rename_block(
        self, inode: Inode, target: Inode | None, old: bytes, new: tuple[int, bytes, bytes]
    ) -> None:
        catalog = self.volume.catalog
        new_parent, new_name, new_path = new
        replicas = catalog.replicas(inode.id)
        replaced = catalog.replicas(target.id) if target else []
        crowded, entry = catalog.is_crowded(new_parent), catalog.entry(inode.id)
        # What a tier refused in this directory it would refuse again.
        stays = entry is not None and entry[0] == new_parent
        fanned = {r.tier: crowded or (stays and bool(r.fanned)) for r in replicas}
        intents: list[tuple[Tier, Intent]] = []
        with catalog.transaction("rename"):
            promised: dict[int, int] = {}
            if target is not None:
                leftover = [r for r in replaced if fanned.get(r.tier) != bool(r.fanned)]
                promised = self.replicas.promise_removal(target.id, new_path, leftover)
                catalog.delete(target.id)
            catalog.relink(inode.id, new_parent, new_name)
            self._publish(inode)
            for replica in replicas:
                tier = self.volume.by_number[replica.tier]
                stored = layout.stored_path(old, bool(replica.fanned))
                goal = layout.stored_path(new_path, fanned[replica.tier])
                if bool(replica.fanned) != fanned[replica.tier]:
                    catalog.set_fanned(inode.id, replica.tier, fanned[replica.tier])
                intent = catalog.intents.add(tier.number, "rename", inode.id, stored, goal)
                intents.append((tier, intent))
        if target is not None:
            self.replicas.account_removal(self.current(target), replaced, promised)
        try:
            await self._carry_out(old, new_path, intents)
        except OSError:
            await self._revert(inode, old, replicas, intents)
            raise
        if inode.state in (BlockState.WRITING, BlockState.PUBLISHED):
            self.volume.request_seal(inode.id)
        if inode.state == BlockState.SEALED:
            await self._sync_renamed(intents)
        if promised:
            await self._settle_inline(promised)

    async def _sync_renamed(self, intents: list[tuple[Tier, Intent]]) -> None:
        """What outlived a power loss under its old name does so under the new one."""
        for tier, intent in intents:
            if tier.durable and tier.online:
                names = [tier.root + b"/" + name for name in (self._goal(intent), intent.path)]
                with self.volume.overlook("syncs_failed", tier):
                    await tier.run_in_thread(sync_block, tier, names)
                    failpoints.hit("rename.synced")

    def _goal(self, intent: Intent) -> bytes:
        """Where a rename has put a file: a tier that refused the name has it fanned out."""
        assert intent.target is not None, "a rename has a target"
        for replica in self.volume.catalog.replicas(intent.inode):
            if replica.tier == intent.tier:
                path, _ = layout.logical_path(intent.target)
                return layout.stored_path(path, bool(replica.fanned))
        return intent.target

    def _publish(self, inode: Inode) -> None:
        """The rename of a file being written publishes it, with the size it has now."""
        columns: dict[str, int] = {"generation": inode.generation + 1}
        if inode.state == BlockState.WRITING:
            columns["state"] = int(BlockState.PUBLISHED)
            self.volume.counters.count("publishes")
        current = self.current(inode)
        if current is not inode:
            columns |= {"size_bytes": current.size_bytes, "mtime_ns": current.mtime_ns}
        columns["ctime_ns"] = int(self.volume.clock.now_s() * 1e9)
        self.volume.catalog.update(inode.id, **columns)

    async def _carry_out(self, old: bytes, new: bytes, intents: list[tuple[Tier, Intent]]) -> None:
        """Do it on the inline tier at once and on the others under a claim.

        A tier that is or goes offline keeps its intent for later.
        """
        pending = [(tier, intent) for tier, intent in intents if not tier.inline]
        for tier, intent in intents:
            if tier.inline:
                await self._apply_in_order(tier, intent, old, new)
        if not pending:
            return
        async with self.volume.claims.hold(old, new):
            for tier, intent in pending:
                await self._apply_in_order(tier, intent, old, new)

    async def _apply_in_order(self, tier: Tier, intent: Intent, old: bytes, new: bytes) -> None:
        """An intent, after those before it that speak of the same paths.

        What was promised for a file in a directory must find it before the directory moves. A tier
        that fails does it later. Raises OSError when it refuses this very change.
        """
        if not tier.online:
            return  # done when it comes back
        promised = self.volume.catalog.intents.left(tier.number, upto=intent.id)
        for due in promised:
            if due.id != intent.id and not meets(due, old, new):
                continue
            try:
                if tier.inline and len(promised) == 1:
                    # Committed just now, without a checkpoint since: nothing has made it void.
                    await self.replicas.carry_out_rename(tier, due)
                else:
                    await self.replicas.apply(tier, due)
            except (OSError, TierOffline) as error:
                if due.id == intent.id and _is_refusal(error):
                    raise
                self.volume.counters.count(
                    "promises_delayed", reason=reason_of(error), tier=tier.name
                )
                tier.health.behind = True
                return
            self.replicas.finish(tier, due.id)

    async def _revert(
        self, inode: Inode, old: bytes, replicas: list[Replica], intents: list[tuple[Tier, Intent]]
    ) -> None:
        """A tier refused the new name: the old one holds again. What was replaced is gone.

        Tiers that have the new name already are to take it back; a directory may have moved in
        part.
        """
        catalog = self.volume.catalog
        undo = []
        for tier, intent in intents:
            done = not catalog.intents.is_left(intent.id)
            if done or inode.kind == Kind.DIRECTORY:
                undo.append((tier, intent))
                if not done:
                    self.replicas.finish(tier, intent.id)
        goals = {intent.id: self._goal(intent) for _, intent in undo}
        directory, name = layout.split(old)
        parent = catalog.resolve(directory)
        if parent is None or catalog.lookup(parent.id, name) is not None:
            return
        with catalog.transaction("undo_rename"):
            catalog.relink(inode.id, parent.id, name)
            if inode.kind == Kind.BLOCK and not undo:
                # No tier has the new name, so the records are right as they are.
                catalog.update(inode.id, generation=inode.generation)
            for replica in replicas:
                catalog.set_fanned(inode.id, replica.tier, bool(replica.fanned))
            for tier, intent in undo:
                catalog.intents.add(tier.number, "rename", inode.id, goals[intent.id], intent.path)
        if inode.kind == Kind.DIRECTORY:
            catalog.forget_paths()
        for tier, intent in intents:
            if (tier, intent) not in undo:
                # It keeps its name, and gets a record of the generation that the block has now.
                with self.volume.overlook("mirrors_failed", tier):
                    kept = intent._replace(target=intent.path)
                    await self.replicas.carry_out_rename(tier, kept)
        await self._settle_inline({tier.number for tier, _ in undo})

    async def _settle_inline(self, promised: Container[int]) -> None:
        for tier in self.volume.tiers:
            if tier.inline and tier.online and tier.number in promised:
                await self.replicas.settle(tier)
        self.volume.settling_due.set()

    async def _rename_directory(
        self, inode: Inode, target: Inode | None, old: bytes, new: tuple[int, bytes, bytes]
    ) -> None:
        catalog = self.volume.catalog
        new_parent, new_name, new_path = new
        intents: list[tuple[Tier, Intent]] = []
        with catalog.transaction("rename_directory"):
            if target is not None:
                catalog.delete(target.id)
            catalog.relink(inode.id, new_parent, new_name)
            intents += [
                (tier, catalog.intents.add(tier.number, "rename", inode.id, old, new_path))
                for tier in self.volume.tiers
            ]
        catalog.forget_paths()
        if target is not None:
            self.volume.directories -= 1
        try:
            await self._carry_out(old, new_path, intents)
        except OSError:
            await self._revert(inode, old, [], intents)
            raise

    # --- helpers

    def _refuse_reserved(self, name: bytes) -> None:
        if name in layout.RESERVED_NAMES:
            raise NotPermitted(f"{name.decode()} is reserved for kvfs")

    def _existing(self, parent: int, name: bytes) -> Inode:
        inode = self.volume.catalog.lookup(parent, name)
        if inode is None:
            raise BlockNotFound(os.fsdecode(name))
        return inode


def _is_refusal(error: OSError | TierOffline) -> bool:
    """Whether a tier will not have a name, rather than cannot take it now or has it already."""
    delayed = isinstance(error, TierOffline | RecordBehind)
    return not (delayed or is_of_medium(error) or is_shortage(error))


def _make_directory(tier: Tier, path: bytes, mode: int, uid: int, gid: int) -> None:
    absolute = tier.locate(path)
    failpoints.hit("mkdir.making")
    tier.files.make_directories(absolute)
    set_owner(tier, absolute, mode, uid, gid)


def set_owner(tier: Tier, absolute: bytes, mode: int, uid: int, gid: int) -> None:
    """A tier's directory shows what the mount shows; kvfs itself always gets in. Blocking."""
    descriptor = tier.files.open(absolute, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fchmod(descriptor, stat.S_IMODE(mode) | 0o700)
        give_owner(descriptor, uid, gid)
    finally:
        os.close(descriptor)
