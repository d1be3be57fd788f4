"""The file of the catalog: where it lies, and what becomes of one that is damaged or old."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

from kvfs import failpoints, layout
from kvfs.catalog.catalog import Catalog
from kvfs.config import Config, TierConfig
from kvfs.errors import CatalogError
from kvfs.tiers.identity import TierIdentity
from kvfs.tiers.tier import Tier

log = logging.getLogger(__name__)

DAMAGED = (
    "the catalog {path} is damaged: it is set aside as catalog.corrupt, and the next start makes "
    "it anew from the tiers"
)


def catalog_path(config: Config) -> Path:
    """Where the catalog lies: on the fastest tier unless configured."""
    return config.mount.catalog or config.tier[0].path / os.fsdecode(layout.CATALOG_FILE)


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
    except (sqlite3.DatabaseError, UnicodeDecodeError, MemoryError):
        # When SQLite's message quotes what is damaged, or a length that is takes no end of memory.
        aside = set_aside(path, ".corrupt")
        return Catalog(path), aside


def set_aside(path: Path, suffix: str) -> Path:
    """Rename a catalog with its log; where it is now."""
    aside = path.with_suffix(suffix)
    for part in ("", "-wal", "-shm"):
        source = Path(f"{path}{part}")
        if source.exists():
            source.rename(f"{aside}{part}")
            failpoints.hit("open.catalog_set_aside")
    return aside


@contextlib.contextmanager
def claimed(config: TierConfig, identity: TierIdentity | None) -> Iterator[None]:
    """No other daemon has the catalog while it is checked, migrated or set aside."""
    if identity is None:
        yield
        return
    tier = Tier(0, 0, config, identity)
    tier.lock()
    try:
        file = tier.root + b"/" + layout.CATALOG_FILE
        if tier.files.exists(file) and stat.S_ISLNK(tier.files.status(file).st_mode):
            raise CatalogError(
                f"{os.fsdecode(file)} is a symbolic link: a catalog that is to lie elsewhere is "
                "named by `catalog` in [mount]"
            )
        yield
    finally:
        tier.unlock()


def open_current(path: Path, found: list[TierIdentity | None]) -> Catalog:
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
