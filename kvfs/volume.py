"""One filesystem in use: its tiers, catalog and accounts, opened together or refused together.

`open_volume` is where every rule about which directories may be mounted lives; nothing is changed
before all of them hold. The parts that change the namespace share a `Volume`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import trio

from kvfs import layout
from kvfs.accesses import Accesses
from kvfs.catalog import Catalog
from kvfs.claims import Claims
from kvfs.clock import Clock
from kvfs.config import Config, TierConfig
from kvfs.errors import CatalogError, TierError, is_expected
from kvfs.metrics import Counters
from kvfs.rows import ROOT_INODE, Kind
from kvfs.space import Space
from kvfs.tier import (
    ABSENT,
    Member,
    Tier,
    TierIdentity,
    init_tier,
    is_empty,
    read_identity,
    write_identity,
)
from kvfs.units import format_size

log = logging.getLogger(__name__)

SEALS_REMEMBERED = 65_536


def no_invalidation(parent: int, name: bytes) -> None:
    """Where nothing is mounted, nobody has cached a name."""


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
    claims: Claims = field(default_factory=Claims)
    clock: Clock = field(default_factory=Clock)
    counters: Counters = field(default_factory=Counters)
    # Called with (parent inode, name) whenever a name appears or goes without the kernel asking.
    name_changed: Callable[[int, bytes], None] = no_invalidation
    # Set to wake the tiering loop, the sealer and the services that carry out intents.
    tiering_due: trio.Event = field(default_factory=trio.Event)
    sealing_due: trio.Event = field(default_factory=trio.Event)
    settling_due: trio.Event = field(default_factory=trio.Event)
    to_seal: set[int] = field(default_factory=set)
    # Being hashed; a writer takes its block out, so that no older hash is committed for it.
    sealing: set[int] = field(default_factory=set)
    _tolerated: dict[str, str] = field(default_factory=dict)
    walking: bool = False
    blocks: int = 0
    directories: int = 0

    def __post_init__(self) -> None:
        self.by_number = {tier.number: tier for tier in self.tiers}

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
            self.to_seal.add(inode)
        self.sealing_due.set()

    @contextlib.contextmanager
    def tolerate(self, what: str) -> Iterator[None]:
        """Something that is tried again may fail for a tier or the catalog's disk: it is said
        once, and the mount goes on."""
        try:
            yield
        except Exception as error:
            if not is_expected(error):
                raise
            if self._tolerated.get(what) != str(error):
                self._tolerated[what] = str(error)
                log.error("%s: %s", what, error)
            self.counters.count("tolerated_failures")
        else:
            self._tolerated.pop(what, None)

    def load_usage(self) -> None:
        """Fill the accounts from the catalog: two scans, at mount only."""
        for number, (count, size) in self.catalog.usage().items():
            account = self.space[self.by_number[number].index]
            account.used_bytes, account.blocks = size, count
        self.space.duplicate_bytes = self.catalog.duplicate_bytes()
        self.blocks, self.directories = self.catalog.totals()

    def close(self, *, clean: bool) -> None:
        """Close the catalog and give the tiers back."""
        if clean:
            self.catalog.set_meta("clean", "1")
        self.catalog.close()
        for tier in self.tiers:
            tier.unlock()


def boot_id() -> str:
    """The kernel's name for this boot: what was in the page cache then is still there."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def catalog_path(config: Config) -> Path:
    """Where the catalog lies: on the fastest tier unless configured."""
    return config.mount.catalog or config.tier[0].path / os.fsdecode(layout.CATALOG_FILE)


def open_volume(config: Config, forget: tuple[str, ...] = ()) -> Volume:
    """Check every tier, initialise new empty ones, open the catalog.

    Raises TierError, CatalogError: nothing was changed then but new directories' identities.
    """
    found = [_find_identity(tier) for tier in config.tier]
    _check_replaced(config, found, forget)
    _check_distinct(config)
    existed = any(found)
    path = catalog_path(config)
    if found[0] is None and config.mount.catalog is None:
        found[0] = init_tier(config.tier[0].path)
    catalog = _open_current(path, found)
    try:
        tiers = _open_tiers(config, catalog, found, forget)
        return _assemble(config, tiers, catalog, rebuild=existed and catalog.created)
    except BaseException:
        catalog.close()
        if catalog.created and not existed:
            path.unlink(missing_ok=True)
        raise


def open_catalog(path: Path) -> tuple[Catalog, Path | None]:
    """Open, or set a corrupt one aside and begin anew; the path of what was set aside.

    Raises CatalogError when the schema is newer than this kvfs, or the disk is full, say.
    """
    try:
        return Catalog(path), None
    except CatalogError:
        raise
    except sqlite3.OperationalError as error:
        raise CatalogError(f"the catalog {path} cannot be opened: {error}") from None
    except sqlite3.DatabaseError:
        aside = set_aside(path, ".corrupt")
        return Catalog(path), aside


def set_aside(path: Path, suffix: str) -> Path:
    """Rename a catalog with its log; where it is now."""
    aside = path.with_suffix(suffix)
    for part in ("", "-wal", "-shm"):
        source = Path(f"{path}{part}")
        if source.exists():
            source.rename(f"{aside}{part}")
    return aside


def _open_current(path: Path, found: list[TierIdentity | None]) -> Catalog:
    """The catalog, or a new one where there is none, it is corrupt or older than its tiers."""
    catalog, aside = open_catalog(path)
    if aside:
        log.warning("the catalog was corrupt; set aside as %s and rebuilt", aside)
    known = {uuid for _, uuid, _, _ in catalog.known_tiers()}
    mounts = [identity.mounts for identity in found if identity and identity.uuid in known]
    if mounts and int(catalog.meta("mounts") or 0) < max(mounts):
        catalog.close()
        aside = set_aside(path, ".old")
        log.warning("the catalog is older than its tiers; set aside as %s and rebuilt", aside)
        catalog = Catalog(path)
    return catalog


def _assemble(config: Config, tiers: list[Tier], catalog: Catalog, *, rebuild: bool) -> Volume:
    if catalog.get(ROOT_INODE) is None:
        status = os.stat(config.tier[0].path)
        catalog.insert_inode(
            Kind.DIRECTORY, 0o755, status.st_uid, status.st_gid, status.st_mtime_ns,
            inode=ROOT_INODE,
        )  # fmt: skip
    unclean = not catalog.created and catalog.meta("clean") != "1"
    same_boot = catalog.meta("boot_id") == boot_id()
    catalog.set_meta("clean", "0")
    catalog.set_meta("boot_id", boot_id())
    volume = Volume(
        config=config, tiers=tiers, catalog=catalog, space=Space(config.tier),
        accesses=Accesses(config.tiering.half_life_s),
        rebuild=rebuild, unclean=unclean, same_boot=same_boot,
    )  # fmt: skip
    volume.load_usage()
    return volume


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


def _check_distinct(config: Config) -> None:
    """Refuse one directory under two paths (a bind mount), before it gets an identity."""
    first: dict[tuple[int, int], str] = {}
    for tier in config.tier:
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
    forget: tuple[str, ...],
) -> list[Tier]:  # fmt: skip
    known = {uuid: (number, name, path) for number, uuid, name, path in catalog.known_tiers()}
    tiers = []
    for index, (tier, identity) in enumerate(zip(config.tier, found, strict=True)):
        if identity is None:
            identity = _identity_of_missing(tier, known, forget)
        elif identity.uuid not in known and identity.members and not catalog.created:
            raise TierError(
                f"tier {tier.name}: {tier.path} belongs to another kvfs; mount it with that one's "
                f"configuration, or remove {tier.path}/.kvfs and run "
                f"`kvfs tier init {tier.path} --adopt`"
            )
        number = catalog.tier_number(identity.uuid, tier.name, str(tier.path))
        opened = Tier(index, number, tier, identity)
        if identity.probe is ABSENT:
            opened.mark_offline(f"{tier.path} is not mounted")
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
    tier: TierConfig, known: dict[str, tuple[int, str, str]], forget: tuple[str, ...]
) -> TierIdentity:
    """Initialise a new empty directory, or stand in for a remote tier that is away."""
    for uuid, (_, name, path) in known.items():
        if name in forget or (name != tier.name and path != str(tier.path)):
            continue
        if tier.medium != "remote":
            _refuse_unmounted(tier, {(name, path)})
        return TierIdentity(uuid=uuid, format_version=1, created_at=0.0, probe=ABSENT)
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
                f"{alone} blocks; add it again, or give them up with --forget-tier {name}"
            )
    for number, _, name, path in absent:
        alone = catalog.sole_replicas(number)
        log.warning("tier %s (%s) is forgotten; %d blocks were only there", name, path, alone)
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
    members = {t.identity.uuid: Member(t.name, str(t.config.path)) for t in tiers}
    for tier in tiers:
        if tier.online:
            tier.identity = msgspec.structs.replace(tier.identity, members=members, mounts=mounts)
            write_identity(tier.config.path, tier.identity)
