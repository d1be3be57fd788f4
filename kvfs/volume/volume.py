"""One filesystem in use: its tiers, catalog and accounts, opened together or refused together.

`open_volume` is where every rule about which directories may be mounted lives; nothing is changed
before all of them hold. The parts that change the namespace share a `Volume`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import trio

from kvfs import failpoints, layout
from kvfs.catalog import scans
from kvfs.catalog.catalog import Catalog
from kvfs.catalog.rows import ROOT_INODE, Kind
from kvfs.clock import Clock
from kvfs.config import Config, TierConfig
from kvfs.errors import (
    BlockBusy,
    CatalogError,
    TierError,
    TierOffline,
    damaged_catalog,
    is_expected,
    is_of_catalog_disk,
    is_of_damaged_catalog,
    reason_of,
)
from kvfs.incidents import Incidents
from kvfs.metrics import Counters
from kvfs.tiers.deadlines import answers
from kvfs.tiers.health import is_full
from kvfs.tiers.identity import (
    ABSENT,
    FORMAT_VERSION,
    Member,
    TierIdentity,
    init_tier,
    is_empty,
    read_identity,
    write_identity,
)
from kvfs.tiers.space import Space
from kvfs.tiers.tier import Tier
from kvfs.units import format_blocks, format_size
from kvfs.volume.accesses import Accesses
from kvfs.volume.catalog_file import DAMAGED, catalog_path, claimed, open_current, set_aside
from kvfs.volume.claims import Claims

log = logging.getLogger(__name__)

SEALS_REMEMBERED = 65_536
# In the catalog's meta: it knows all that its tiers hold. Until then it is (still) rebuilt.
COMPLETE = "complete"
# It may lack what its tiers have, since the machine stopped.
BEHIND = "behind"


def no_invalidation(parent: int, name: bytes) -> None:
    """Where nothing is mounted, nobody has cached a name."""


def no_attributes(inode: int) -> None:
    """Nor attributes."""


async def nobody_to_tell() -> None:
    """Where nothing is mounted, there is nobody to wait for."""


@dataclass
class Volume:
    """What all services share. Owned by the trio loop."""

    config: Config
    tiers: list[Tier]
    catalog: Catalog
    space: Space
    accesses: Accesses
    rebuild: bool
    unclean: bool
    same_boot: bool
    # The machine stopped: until the walk has ended, the tiers may know what the catalog lost.
    catalog_behind: bool
    # Intents up to this one it may promise though they were carried out before.
    doubted_intent: int
    # The number of this mount, and of the last one that began after an end without order.
    mounts: int
    crashed: int
    claims: Claims = field(default_factory=Claims)
    clock: Clock = field(default_factory=Clock)
    counters: Counters = field(default_factory=Counters)
    # Called with (parent inode, name) whenever a name appears or goes without the kernel asking.
    name_changed: Callable[[int, bytes], None] = no_invalidation
    # Called with an inode whose attributes changed without the kernel asking.
    attributes_changed: Callable[[int], None] = no_attributes
    # Returns when the kernel knows of all that.
    names_told: Callable[[], Awaitable[None]] = nobody_to_tell
    # Set to wake the tiering loop, the sealer and the services that carry out intents.
    tiering_due: trio.Event = field(default_factory=trio.Event)
    sealing_due: trio.Event = field(default_factory=trio.Event)
    settling_due: trio.Event = field(default_factory=trio.Event)
    # By the time when it was first asked for, oldest first.
    to_seal: dict[int, float] = field(default_factory=dict)
    # Being hashed; a writer takes its block out, so that no older hash is committed for it.
    sealing: set[int] = field(default_factory=set)
    # Not sealed although closed: their writer was refused. Few, and gone with the daemon.
    torn: set[int] = field(default_factory=set)
    walking: bool = False
    # Set aside when it is closed.
    damaged: bool = False
    blocks: int = 0
    directories: int = 0

    def __post_init__(self) -> None:
        self.incidents = Incidents(self.counters)
        for tier in self.tiers:
            tier.health.incidents = self.incidents
        self.by_number = {tier.number: tier for tier in self.tiers}

    def long_calls(self) -> int:
        """How many threads hash, copy or sync, or are about to."""
        calls = sum(tier.long_limiter.borrowed_tokens for tier in self.tiers)
        return max(calls, bool(self.sealing))

    def not_sealed(self, inode: int) -> BlockBusy:
        """Why a block that is to be sealed first is left alone."""
        if inode in self.torn:
            return BlockBusy("its last write was refused; remove it or write it again")
        return BlockBusy("it is not sealed yet")

    def tier_named(self, name: str) -> Tier:
        """The tier of this name. Raises TierError naming those that exist."""
        for tier in self.tiers:
            if tier.name == name:
                return tier
        names = ", ".join(tier.name for tier in self.tiers)
        raise TierError(f"no tier is called {name}; there are {names}")

    def request_tiering(self) -> None:
        """Somebody found a tier above its watermark."""
        self.tiering_due.set()

    def request_seal(self, inode: int) -> None:
        """A block was closed or published. What is forgotten here is found by the next scan."""
        if len(self.to_seal) < SEALS_REMEMBERED:
            self.to_seal.setdefault(inode, time.monotonic())
        else:
            self.counters.count("seals_postponed", reason="queue")
        self.sealing_due.set()

    @contextlib.contextmanager
    def tolerate(self, what: str, tier: str = "") -> Iterator[None]:
        """Something that is tried again may fail for a tier or the catalog's disk: it is counted
        and told, and the mount goes on."""
        try:
            yield
        except Exception as error:
            if not is_expected(error):
                raise
            where = f"tier {tier}: {what}" if tier else what
            self.incidents.note(
                "tolerated_failures", f"{where}: {error}", reason=reason_of(error), tier=tier
            )

    @contextlib.contextmanager
    def overlook(self, event: str, tier: Tier) -> Iterator[None]:
        """What a tier fails at here does no harm, or is done later: it is counted, not told."""
        try:
            yield
        except (OSError, TierOffline) as error:
            self.counters.count(event, reason=reason_of(error), tier=tier.name)

    def load_usage(self) -> None:
        """Fill the accounts from the catalog: two scans, at mount only."""
        try:
            self._fill_accounts(self.catalog.connection)
        except sqlite3.OperationalError as error:
            if is_of_catalog_disk(error):
                raise
            # A sum that no sizes of files can have.
            raise damaged_catalog(str(error)) from None
        sums = [self.space.duplicate_bytes, *(tier.used_bytes for tier in self.space.tiers)]
        if {type(size) for size in sums} != {int} or min(sums) < 0:
            raise damaged_catalog("the sizes of replicas make no sense")

    def _fill_accounts(self, connection: sqlite3.Connection) -> None:
        for number, (count, size) in scans.usage(connection).items():
            account = self.space[self.by_number[number].index]
            account.used_bytes, account.blocks = size, count
        for number, saved_bytes in scans.saved_bytes(connection).items():
            self.space[self.by_number[number].index].saved_bytes = saved_bytes
        self.space.duplicate_bytes = scans.duplicate_bytes(connection)
        self.blocks, self.directories = scans.totals(connection)

    def recovered(self) -> None:
        """What must hold before serving holds. Until here the next start would do it again, and
        know that the machine had stopped."""
        self.catalog.set_meta("boot_id", boot_id())
        self.catalog.set_meta(COMPLETE, "1")
        failpoints.hit("recovery.finished")

    def caught_up(self) -> None:
        """The catalog knows all that its tiers have."""
        self.catalog.set_meta(BEHIND, "0")
        self.catalog_behind, self.doubted_intent = False, 0

    def close(self, *, clean: bool) -> None:
        """Close the catalog and give the tiers back. A walk that has not ended begins anew at the
        next mount."""
        if clean and not self.walking:
            self.catalog.set_meta("clean", "1")
            failpoints.hit("close.marked_clean")
        self.catalog.close()
        if self.damaged:
            set_aside(self.catalog.path, ".corrupt")
        for tier in self.tiers:
            tier.unlock()

    @contextlib.contextmanager
    def damage_told(self) -> Iterator[None]:
        """Around all use of the volume: damage of the catalog that its check at opening does not
        find ends it with CatalogError, and the next start makes the catalog anew."""
        try:
            yield
        except Exception as error:
            if is_of_catalog_disk(error):
                path = self.catalog.path
                raise CatalogError(f"the catalog {path} cannot be used: {error}") from error
            if not is_of_damaged_catalog(error):
                raise
            self.damaged = True
            raise CatalogError(DAMAGED.format(path=self.catalog.path)) from error


def boot_id() -> str:
    """The kernel's name for this boot: what was in the page cache then is still there."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def open_volume(config: Config, forget: tuple[str, ...] = (), *, only_look: bool = False) -> Volume:
    """Check every tier, initialise new empty ones, open the catalog.

    With `only_look` the next mount still knows how this volume was left, unless there was no
    catalog.
    Raises TierError, CatalogError: nothing was changed then but new directories' identities.
    """
    silent = frozenset(tier.name for tier in config.tier if _is_silent(tier))
    found = [None if tier.name in silent else _find_identity(tier) for tier in config.tier]
    _check_replaced(config, found, forget)
    _check_distinct(tier for tier in config.tier if tier.name not in silent)
    existed = any(found)
    path = catalog_path(config)
    if found[0] is None and config.mount.catalog is None:
        found[0] = init_tier(config.tier[0].path)
    with claimed(config.tier[0], found[0]):
        catalog = open_current(path, found)
    try:
        tiers = _open_tiers(config, catalog, found, forget, silent)
        rebuild = existed and catalog.meta(COMPLETE) != "1"
        mark = rebuild or not only_look
        return _assemble(config, tiers, catalog, rebuild=rebuild, mark=mark)
    except BaseException as error:
        catalog.close()
        if catalog.created and not existed:
            path.unlink(missing_ok=True)
        if is_of_catalog_disk(error):
            raise CatalogError(f"the catalog {path} cannot be used: {error}") from error
        if not is_of_damaged_catalog(error):
            raise
        set_aside(path, ".corrupt")
        raise CatalogError(DAMAGED.format(path=path)) from error


def _assemble(
    config: Config, tiers: list[Tier], catalog: Catalog, *, rebuild: bool, mark: bool
) -> Volume:
    if catalog.get(ROOT_INODE) is None:
        status = os.stat(config.tier[0].path)
        catalog.insert_inode(
            Kind.DIRECTORY, 0o755, status.st_uid, status.st_gid, status.st_mtime_ns,
            inode=ROOT_INODE,
        )  # fmt: skip
    unclean = not catalog.created and catalog.meta("clean") != "1"
    same_boot = catalog.meta("boot_id") == boot_id()
    behind = rebuild or catalog.meta(BEHIND) == "1" or (unclean and not same_boot)
    promised = [i.id for tier in tiers for i in catalog.intents.left(tier.number)] if behind else []
    mounts = catalog.meta("mounts") or "0"
    if mark:
        if rebuild or unclean or not same_boot:
            catalog.set_meta("crashed", mounts)
        catalog.set_meta(BEHIND, str(int(behind)))
        # Else a power loss would leave a catalog that says it is complete.
        catalog.set_meta_durably("clean", "0")
        failpoints.hit("open.marked_unclean")
    volume = Volume(
        config=config, tiers=tiers, catalog=catalog, space=Space(config.tier),
        accesses=Accesses(config.tiering.half_life_s),
        rebuild=rebuild, unclean=unclean or behind, same_boot=same_boot, catalog_behind=behind,
        doubted_intent=max(promised, default=0),
        mounts=int(mounts), crashed=int(catalog.meta("crashed") or 0),
    )  # fmt: skip
    volume.load_usage()
    return volume


def _is_silent(tier: TierConfig) -> bool:
    """Whether a tier does not answer, or fails: nobody waits for it then.

    Raises TierError for one that is required and hangs.
    """
    remote = tier.medium == "remote"

    def ask() -> None:
        with contextlib.suppress(FileNotFoundError, TierError):
            try:
                os.statvfs(tier.path)
                read_identity(tier.path)
            except OSError:
                if remote:
                    raise

    silent = not answers(ask, tier.deadline_s)
    if silent and not remote:
        raise TierError(
            f"tier {tier.name}: {tier.path} does not answer within {tier.deadline_s:g} s; "
            "is its disk in order?"
        )
    return silent


def _find_identity(tier: TierConfig) -> TierIdentity | None:
    """The identity at a configured path; None where there is none yet."""
    if not tier.path.is_dir():
        if tier.medium == "remote":
            return None
        raise TierError(
            f"tier {tier.name}: {tier.path} does not exist; create it or mount its disk"
        )
    check_capacity(tier)
    try:
        return read_identity(tier.path)
    except FileNotFoundError:
        return None


def check_capacity(tier: TierConfig) -> None:
    """Raise TierError for a capacity that the filesystem at its path cannot have."""
    status = os.statvfs(tier.path)
    size_bytes = status.f_blocks * status.f_frsize
    if size_bytes and tier.capacity_bytes > size_bytes:
        raise TierError(
            f"tier {tier.name}: capacity {format_size(tier.capacity_bytes)} is above the "
            f"{format_size(size_bytes)} of the filesystem at {tier.path}; is its disk mounted?"
        )


def _check_distinct(tiers: Iterable[TierConfig]) -> None:
    """Refuse one directory under two paths (a bind mount), before it gets an identity."""
    first: dict[tuple[int, int], str] = {}
    for tier in tiers:
        if tier.path.is_dir():
            status = os.stat(tier.path)
            twin = first.setdefault((status.st_dev, status.st_ino), tier.name)
            if twin != tier.name:
                raise TierError(f"two tiers are the same directory: {twin} and {tier.name}")


def _check_replaced(
    config: Config, found: list[TierIdentity | None], forget: tuple[str, ...]
) -> None:
    """Refuse an empty directory where another tier remembers a member, and twice the same tier."""
    uuids = [identity.uuid for identity in found if identity]
    if len(set(uuids)) < len(uuids):
        raise TierError("two tiers are the same directory (their tier.json has the same uuid)")
    members = {
        (member.name, member.path)
        for identity in found if identity
        for uuid, member in identity.members.items() if uuid not in uuids
    }  # fmt: skip
    for tier, identity in zip(config.tier, found, strict=True):
        if identity is None and tier.medium != "remote" and tier.name not in forget:
            _refuse_unmounted(tier, members)


def _refuse_unmounted(tier: TierConfig, members: set[tuple[str, str]]) -> None:
    if any(str(tier.path) == path or tier.name == name for name, path in members):
        raise TierError(
            f"tier {tier.name}: {tier.path} has no {os.fsdecode(layout.IDENTITY_FILE)} but was in "
            f"use before: is its disk mounted? If it was replaced: --forget-tier {tier.name}"
        )
    if not is_empty(tier.path):
        raise TierError(
            f"tier {tier.name}: {tier.path} is not empty and not a kvfs tier; to take over what "
            f"lies there run `kvfs tier init {tier.path} --adopt`"
        )


def _open_tiers(
    config: Config, catalog: Catalog, found: list[TierIdentity | None],
    forget: tuple[str, ...], silent: frozenset[str],
) -> list[Tier]:  # fmt: skip
    known = {uuid: (number, name, path) for number, uuid, name, path in catalog.known_tiers()}
    tiers = []
    for index, (tier, identity) in enumerate(zip(config.tier, found, strict=True)):
        if identity is None:
            identity = _identity_of_missing(tier, known, forget, silent)
        elif identity.uuid not in known and identity.members and not catalog.created:
            raise TierError(
                f"tier {tier.name}: {tier.path} belongs to another kvfs; mount it with that one's "
                f"configuration, or remove {tier.path}/.kvfs and run "
                f"`kvfs tier init {tier.path} --adopt`"
            )
        number = catalog.tier_number(identity.uuid, tier.name, str(tier.path))
        failpoints.hit("open.tier_known")
        opened = Tier(index, number, tier, identity)
        if identity.probe is ABSENT:
            how = "does not answer" if tier.name in silent else "is not mounted"
            opened.health.lost(f"{tier.path} {how}")
        tiers.append(opened)
    # Before anything is forgotten: another daemon may have this catalog.
    _lock_all(tiers)
    try:
        _forget_absent(catalog, {tier.number for tier in tiers}, forget)
        _remember_members(tiers, catalog)
    except BaseException:
        for opened in tiers:
            opened.unlock()
        raise
    return tiers


def _identity_of_missing(
    tier: TierConfig, known: dict[str, tuple[int, str, str]], forget: tuple[str, ...],
    silent: frozenset[str],
) -> TierIdentity:  # fmt: skip
    """Initialise a new empty directory, or stand in for a remote tier that is away."""
    for uuid, (_, name, path) in known.items():
        if name in forget or (name != tier.name and path != str(tier.path)):
            continue
        if tier.medium != "remote":
            _refuse_unmounted(tier, {(name, path)})
        return TierIdentity(uuid, FORMAT_VERSION, created_at=0.0, probe=ABSENT)
    if tier.name in silent:
        raise TierError(f"tier {tier.name}: {tier.path} does not answer and was never used")
    if not tier.path.is_dir():
        raise TierError(f"tier {tier.name}: {tier.path} does not exist and was never used")
    return init_tier(tier.path)


def _forget_absent(catalog: Catalog, present: set[int], forget: tuple[str, ...]) -> None:
    absent = [known for known in catalog.known_tiers() if known[0] not in present]
    leaving = [number for number, *_ in absent]
    for number, _, name, path in absent:
        alone = catalog.sole_replicas(number, leaving)
        if alone and name not in forget:
            raise TierError(
                f"the configuration lacks tier {name} ({path}), which holds the only replica of "
                f"{format_blocks(alone)}; add it again, or give them up with --forget-tier {name}"
            )
    for number, _, name, path in absent:
        alone = catalog.sole_replicas(number)
        only = format_blocks(alone)
        log.warning("tier %s (%s) is forgotten; what was only there: %s", name, path, only)
        catalog.forget_tier(number)


def _lock_all(tiers: list[Tier]) -> None:
    try:
        for tier in tiers:
            if tier.online:
                tier.lock()
    except BaseException:
        for tier in tiers:
            tier.unlock()
        raise


def _remember_members(tiers: list[Tier], catalog: Catalog) -> None:
    """Each tier's identity names all: so an unmounted disk is never taken for a new tier.

    It also counts the mounts, after the catalog does: a catalog that was left behind counts fewer.
    """
    counted = [tier.identity.mounts for tier in tiers]
    mounts = max(int(catalog.meta("mounts") or 0), *counted) + 1
    catalog.set_meta_durably("mounts", str(mounts))
    failpoints.hit("open.mounts_counted")
    members = {t.identity.uuid: Member(t.name, str(t.config.path)) for t in tiers}
    for tier in tiers:
        if tier.online:
            tier.identity = msgspec.structs.replace(
                tier.identity, members=members, mounts=mounts, format_version=FORMAT_VERSION
            )
            try:
                write_identity(tier.config.path, tier.identity)
            except OSError as error:
                # A full disk must not keep anybody from what is on it.
                if not is_full(error) and error.errno != errno.EROFS:
                    raise
                log.warning("tier %s: its tier.json stays as it was: %s", tier.name, error)
