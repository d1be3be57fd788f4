"""The configuration: TOML, `--tier` options or defaults, checked before anything is touched.

Every refusal is a ConfigError of one line that names the file, the key (`tier[1].capacity`, counted
from 0 like the tiers themselves) and the reason. It follows links to compare paths but never opens,
creates or probes a tier; kvfs.tiers.tier does. The command loads it, the daemon keeps it, and a
reload compares two of them.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta, Struct, field

from kvfs import mount_table
from kvfs.errors import ConfigError
from kvfs.layout import PRIVATE_DIR
from kvfs.units import MAX_SIZE_BYTES, parse_duration, parse_size, printable

Medium = Literal["nvme", "hdd", "remote"]
OnFull = Literal["evict", "refuse"]
Verify = Literal["first-open", "after-crash", "always", "never"]
Unfinished = Literal["remove", "quarantine"]
Durability = Literal["none", "seal"]
Compress = Literal["none", "zstd", "zstd-planes"]
LogLevel = Literal["debug", "info", "warning", "error"]
LeaseWait = Literal["staging", "promote", "none"]

T = TypeVar("T", bound=Struct)

_Bytes = Annotated[int, Meta(ge=1, le=MAX_SIZE_BYTES)]
_BytesOrZero = Annotated[int, Meta(ge=0, le=MAX_SIZE_BYTES)]
_Count = Annotated[int, Meta(ge=1, le=10**8)]
_Fraction = Annotated[float, Meta(gt=0, le=1)]
_Factor = Annotated[float, Meta(ge=0, le=1e6)]
_LONGEST_S = 10 * 365 * 86400.0
_Seconds = Annotated[float, Meta(gt=0, le=_LONGEST_S)]
_SecondsOrZero = Annotated[float, Meta(ge=0, le=_LONGEST_S)]

_CONCURRENCY: dict[Medium, int] = {"nvme": 8, "hdd": 4, "remote": 16}
_DEADLINE_S: dict[Medium, float] = {"nvme": 5.0, "hdd": 10.0, "remote": 10.0}
_DEFAULT_SHARE_OF_FREE_SPACE = 0.8


class TierConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """One `[[tier]]`. What is None comes from `[tiering]`; no write budget means no limit.

    Without a word on durability it is `none` for the first tier and `seal` for the others.
    """

    name: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{1,32}\Z")]
    path: Path
    medium: Medium
    capacity_bytes: _Bytes = field(name="capacity")
    concurrency: Annotated[int, Meta(ge=1, le=256)] = 0
    deadline_s: _Seconds = field(name="deadline", default=0.0)
    high_watermark: _Fraction | None = None
    low_watermark: _Fraction | None = None
    promote_bandwidth: _Bytes | None = None
    write_budget_per_day: _Bytes | None = None
    durability: Durability | None = None
    compress: Compress = "none"

    def __post_init__(self) -> None:
        """Fill in what depends on the medium; a file cannot say 0 for either."""
        if not self.concurrency:
            msgspec.structs.force_setattr(self, "concurrency", _CONCURRENCY[self.medium])
        if not self.deadline_s:
            msgspec.structs.force_setattr(self, "deadline_s", _DEADLINE_S[self.medium])


class TieringConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """`[tiering]`: heat, moves and what is checked; all of it can change while mounted."""

    interval_s: _Seconds = field(name="interval", default=1.0)
    half_life_s: _Seconds = field(name="half_life", default=120.0)
    high_watermark: _Fraction = 0.95
    low_watermark: _Fraction = 0.90
    promote_heat: _Factor = 1.5
    hysteresis: Annotated[float, Meta(ge=1, le=1e6)] = 2.0
    promote_bandwidth: _Bytes = 256 * 2**20
    on_full: OnFull = "evict"
    tmp_ttl_s: _Seconds = field(name="tmp_ttl", default=3600.0)
    keep: tuple[Annotated[str, Meta(min_length=1)], ...] = (
        "config.json",
        "*.metadata",
        "*.json",
        "*.toml",
        "README*",
    )
    quiet_uids: tuple[Annotated[int, Meta(ge=0, lt=2**32)], ...] = ()
    workers: Annotated[int, Meta(ge=1, le=64)] = 8
    ghosts: Annotated[int, Meta(ge=0, le=10**8)] = 100_000
    verify: Verify = "first-open"
    scrub_rate: _BytesOrZero = 0
    seal_rate: _BytesOrZero = 2**30
    unfinished: Unfinished = "remove"
    quarantine_max: _BytesOrZero = 2**30
    quarantine_ttl_s: _Seconds = field(name="quarantine_ttl", default=7 * 86400.0)

    def watermarks(self, tier: TierConfig) -> tuple[float, float]:
        """The low and the high watermark in force on `tier`."""
        return tier.low_watermark or self.low_watermark, tier.high_watermark or self.high_watermark

    def promote_bandwidth_of(self, tier: TierConfig) -> int:
        """Bytes per second that may be promoted onto `tier`."""
        return tier.promote_bandwidth or self.promote_bandwidth


class MountConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """`[mount]`: what the kernel is told once, when the mount is made."""

    allow_other: bool = field(default_factory=lambda: os.geteuid() == 0)
    entry_timeout_s: _SecondsOrZero = field(name="entry_timeout", default=3600.0)
    attr_timeout_s: _SecondsOrZero = field(name="attr_timeout", default=3600.0)
    negative_timeout_s: _SecondsOrZero = field(name="negative_timeout", default=3600.0)
    log_level: LogLevel = "info"
    fsname: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_.:/@-]{1,64}\Z")] = "kvfs"
    catalog: Path | None = None
    passthrough: Literal["auto", "require", "off"] = "auto"


class LeasesConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """`[leases]`: what clients of the library get, and each user's limits; all of it is live."""

    wait: LeaseWait = "staging"
    deadline_s: _Seconds = field(name="deadline", default=10.0)
    max_lease_s: _Seconds = field(name="max_lease", default=600.0)
    max_leases: _Count = 32_768
    max_bytes: _Bytes = 64 * 2**30
    max_waiting: _Count = 64
    staging: _BytesOrZero = 2**30
    prefetches: _Count = 16_384


class Config(Struct, frozen=True):
    """A whole configuration, tiers fastest first; `source` is what error messages call it."""

    tier: tuple[TierConfig, ...]
    tiering: TieringConfig = TieringConfig()
    mount: MountConfig = field(default_factory=MountConfig)
    source: str = "command line"
    leases: LeasesConfig = LeasesConfig()


class _ConfigFile(Struct, frozen=True, forbid_unknown_fields=True):
    """The top level of a file."""

    tier: tuple[TierConfig, ...] = ()
    tiering: TieringConfig = TieringConfig()
    mount: MountConfig = field(default_factory=MountConfig)
    leases: LeasesConfig = LeasesConfig()


def load_config(path: Path) -> Config:
    """Read and check a file."""
    source = str(path)
    try:
        content = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise _refusal(source, "", f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise _refusal(source, "", f"is not UTF-8 at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise _refusal(source, "", f"is not TOML: {error}") from error
    except RecursionError as error:
        raise _refusal(source, "", "is nested too deeply") from error
    document = _parse_units(content, source, "")
    file = _convert(document, _ConfigFile, source)
    config = Config(file.tier, file.tiering, file.mount, source, file.leases)
    check_config(config, None)
    return config


def parse_tier_option(text: str) -> TierConfig:
    """A tier from the command line: "nvme=/mnt/a,capacity=2TiB,medium=nvme"."""
    source = f"--tier {text}"
    # A comma is a separator only before a key, so that a path may have one.
    head, *options = re.split(r",(?=[a-z_]+=)", text)
    name, equals, path = head.partition("=")
    if not equals or not path:
        raise _refusal(source, "", "write for example nvme=/mnt/a,capacity=2TiB")
    table: dict[str, Any] = {"name": name, "path": str(_expand(path, source).absolute())}
    if name in get_args(Medium):
        table["medium"] = name
    given = set(table) - {"medium"}
    for option in options:
        key, _, value = option.partition("=")
        if key in given:
            raise _refusal(source, key, "is given twice")
        given.add(key)
        table[key] = value
    return _convert(_parse_units(table, source, ""), TierConfig, source, strict=False)


def _expand(path: str, source: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise _refusal(source, "path", f"{path}: whose home directory is unknown") from error


def default_config() -> Config:
    """The configuration without any: one nvme tier in the user's data directory.

    What the tier already holds counts as free, or the capacity would shrink from mount to mount.
    """
    data_home = Path(os.environ.get("XDG_DATA_HOME", ""))
    if not data_home.is_absolute():  # the specification says to ignore it then
        data_home = _expand("~/.local/share", "defaults").absolute()
    path = data_home / "kvfs" / "default"
    existing = next(parent for parent in (path, *path.parents) if parent.is_dir())
    space = os.statvfs(existing)
    free_bytes = space.f_bavail * space.f_frsize + _held_bytes(path)
    capacity_bytes = int(free_bytes * _DEFAULT_SHARE_OF_FREE_SPACE)
    if capacity_bytes < 1:
        raise _refusal("defaults", "tier[0].capacity", f"the filesystem of {existing} is full")
    return Config((TierConfig("nvme", path, "nvme", capacity_bytes),), source="defaults")


def _held_bytes(directory: Path) -> int:
    held_bytes = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                held_bytes += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except FileNotFoundError:  # evicted by a daemon that has it mounted
                continue
    return held_bytes


# --- from a document to structs ---------------------------------------------------------------

_SIZE_KEYS = frozenset(
    {
        "capacity",
        "promote_bandwidth",
        "write_budget_per_day",
        "scrub_rate",
        "seal_rate",
        "quarantine_max",
        "max_bytes",
        "staging",
    }
)
_DURATION_KEYS = frozenset(
    {
        "deadline",
        "interval",
        "half_life",
        "tmp_ttl",
        "entry_timeout",
        "attr_timeout",
        "negative_timeout",
        "quarantine_ttl",
        "max_lease",
    }
)

# What a key takes, where msgspec's own words do not say it.
_EXPECTATIONS = {
    "name": "must be 1 to 32 of A-Z a-z 0-9 _ -",
    "medium": f"must be one of {', '.join(get_args(Medium))}",
    "on_full": f"must be one of {', '.join(get_args(OnFull))}",
    "durability": f"must be one of {', '.join(get_args(Durability))}",
    "compress": f"must be one of {', '.join(get_args(Compress))}",
    "verify": f"must be one of {', '.join(get_args(Verify))}",
    "unfinished": f"must be one of {', '.join(get_args(Unfinished))}",
    "log_level": f"must be one of {', '.join(get_args(LogLevel))}",
    "wait": f"must be one of {', '.join(get_args(LeaseWait))}",
    "fsname": "must be 1 to 64 of A-Z a-z 0-9 _ . : / @ -",
    "capacity": "must be more than 0 and at most 8 EiB",
}
_TABLES: dict[str, type[Struct]] = {
    "": _ConfigFile,
    "tier": TierConfig,
    "tiering": TieringConfig,
    "mount": MountConfig,
    "leases": LeasesConfig,
}


def _parse_units(value: Any, source: str, key: str) -> Any:
    """The document with its sizes in bytes and its times in seconds."""
    if isinstance(value, dict):
        return {k: _parse_units(v, source, f"{key}.{k}" if key else k) for k, v in value.items()}
    if isinstance(value, list):
        return [_parse_units(item, source, f"{key}[{i}]") for i, item in enumerate(value)]
    last = key.rpartition(".")[2]
    try:
        if last in _SIZE_KEYS:
            return parse_size(value)
        if last in _DURATION_KEYS:
            return parse_duration(value)
    except ValueError as error:
        raise _refusal(source, key, str(error)) from error
    return value


def _convert(document: Any, kind: type[T], source: str, *, strict: bool = True) -> T:
    try:
        return msgspec.convert(document, kind, strict=strict, dec_hook=_decode_path)
    except msgspec.ValidationError as error:
        raise _translate(error, kind, source) from error


def _decode_path(kind: type, value: Any) -> Path:
    """msgspec's hook for the one type it does not know."""
    if not isinstance(value, str):
        raise ValueError(f"expected {kind.__name__.lower()}, got {type(value).__name__}")
    if "\0" in value:
        raise ValueError("a path has no NUL")
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{value}: whose home directory is unknown") from error
    if not path.is_absolute():
        raise ValueError(f"{value!r} is relative; write an absolute path")
    return path


def _translate(error: msgspec.ValidationError, kind: type[Struct], source: str) -> ConfigError:
    """msgspec's message, with the path as a key and in words for the user."""
    message, _, location = str(error).partition(" - at `$")
    key = location.rstrip("`").lstrip(".")
    if match := re.fullmatch(r"Object contains unknown field `(.*)`", message, re.DOTALL):
        table = _TABLES[key.partition("[")[0]] if kind is _ConfigFile else kind
        known = [known.encode_name for known in msgspec.structs.fields(table)]
        similar = difflib.get_close_matches(match[1], known, 1)
        hint = f"; did you mean {similar[0]}?" if similar else f"; known are {', '.join(known)}"
        return _refusal(source, f"{key}.{match[1]}".lstrip("."), f"unknown key{hint}")
    if match := re.fullmatch(r"Object missing required field `(.*)`", message):
        reason = f"is missing; it {_EXPECTATIONS.get(match[1], 'must be set')}"
        return _refusal(source, f"{key}.{match[1]}".lstrip("."), reason)
    if key == "tier":
        return _refusal(source, key, "must be an array of tables: write [[tier]]")
    plain = message[:1].lower() + message[1:].replace("`", "").replace("object", "table")
    return _refusal(source, key, _EXPECTATIONS.get(key.rpartition(".")[2], plain))


def _refusal(source: str, key: str, reason: str) -> ConfigError:
    text = ": ".join(part for part in (source, key, reason) if part)
    # A quoted TOML key or a file name may have newlines; the message has one line.
    return ConfigError(printable(text))


# --- checks over the whole --------------------------------------------------------------------


def check_config(config: Config, mountpoint: Path | None) -> None:
    """Raise ConfigError unless the parts fit each other and, when it is known, the mountpoint."""
    if not config.tier:
        raise _refusal(config.source, "tier", "is empty; give at least one [[tier]] or --tier")
    _check_names(config)
    _check_compression(config)
    _check_watermarks(config)
    _check_places(config, mountpoint)


def _check_names(config: Config) -> None:
    first: dict[str, int] = {}
    for index, tier in enumerate(config.tier):
        if tier.name in first:
            reason = f"{tier.name} is the name of tier[{first[tier.name]}] as well"
            raise _refusal(config.source, f"tier[{index}].name", reason)
        first[tier.name] = index


def _check_compression(config: Config) -> None:
    for index, tier in enumerate(config.tier):
        if tier.compress != "none" and tier.medium == "nvme":
            reason = f"is for hdd and remote tiers, not for {tier.name}, which is nvme"
            raise _refusal(config.source, f"tier[{index}].compress", reason)


def _check_watermarks(config: Config) -> None:
    tiering = config.tiering
    pairs = [("tiering.low_watermark", tiering.low_watermark, tiering.high_watermark)]
    for index, tier in enumerate(config.tier):
        own = "high" if tier.low_watermark is None else "low"
        pairs.append((f"tier[{index}].{own}_watermark", *tiering.watermarks(tier)))
    for key, low, high in pairs:
        if not 0 < low < high <= 1:
            reason = f"needs 0 < low < high <= 1, but low is {low:g} and high is {high:g}"
            raise _refusal(config.source, key, reason)


def _check_places(config: Config, mountpoint: Path | None) -> None:
    roots = [
        _resolve(tier.path, config.source, f"tier[{index}].path")
        for index, tier in enumerate(config.tier)
    ]
    for index, root in enumerate(roots):
        for other, other_root in enumerate(roots[:index]):
            overlap = _overlap(root, other_root, f"tier[{other}]'s directory")
            if overlap:
                raise _refusal(config.source, f"tier[{index}].path", overlap)
    catalog = None
    if config.mount.catalog is not None:
        catalog = _resolve(config.mount.catalog, config.source, "mount.catalog")
        _check_catalog(catalog, roots, config.source)
    if mountpoint is None:
        return
    mount_root = _resolve(mountpoint, config.source, "mountpoint")
    for index, root in enumerate(roots):
        overlap = _overlap(root, mount_root, "the mountpoint")
        if overlap:
            raise _refusal(config.source, f"tier[{index}].path", overlap)
    if catalog is not None and catalog.is_relative_to(mount_root):
        raise _refusal(config.source, "mount.catalog", f"{catalog} is inside the mountpoint")


def _check_catalog(catalog: Path, roots: list[Path], source: str) -> None:
    for index, root in enumerate(roots):
        private = root / os.fsdecode(PRIVATE_DIR)
        if catalog.is_relative_to(root) and private not in catalog.parents:
            reason = f"{catalog} is inside tier[{index}], where it would be a block; leave it out"
            raise _refusal(source, "mount.catalog", reason)


def _overlap(root: Path, other: Path, called: str) -> str:
    """Why two directories cannot be used together, or "" when they can."""
    if root == other:
        return f"{root} is {called}"
    if root.is_relative_to(other):
        return f"{root} is inside {called}, {other}"
    if other.is_relative_to(root):
        return f"{root} contains {called}, {other}"
    return ""


def _resolve(path: Path, source: str, key: str) -> Path:
    try:
        return mount_table.resolve(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise _refusal(source, key, f"{path} cannot be followed: {error}") from error


# --- showing and reloading --------------------------------------------------------------------


def config_to_builtins(config: Config) -> dict[str, Any]:
    """The configuration as JSON has it: the keys of the file, sizes in bytes, times in seconds."""
    builtins: dict[str, Any] = msgspec.to_builtins(config, enc_hook=str)
    return builtins


_LIVE_TIER_KEYS = frozenset(
    {
        "capacity",
        "concurrency",
        "deadline",
        "high_watermark",
        "low_watermark",
        "promote_bandwidth",
        "write_budget_per_day",
        "durability",
        "compress",
    }
)


def reloadable_changes(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """The keys that differ: those that a reload applies, and those that need a new mount.

    Tiers are matched by name; when one came, went or changed its place, `tier` needs a new mount.
    """
    applied: list[str] = []
    needs_remount: list[str] = []
    if [tier.name for tier in old.tier] != [tier.name for tier in new.tier]:
        needs_remount.append("tier")
    before = {tier.name: tier for tier in old.tier}
    for index, tier in enumerate(new.tier):
        if tier.name in before:
            for key in _differences(before[tier.name], tier):
                changes = applied if key in _LIVE_TIER_KEYS else needs_remount
                changes.append(f"tier[{index}].{key}")
    applied.extend(f"tiering.{key}" for key in _differences(old.tiering, new.tiering))
    applied.extend(f"leases.{key}" for key in _differences(old.leases, new.leases))
    needs_remount.extend(f"mount.{key}" for key in _differences(old.mount, new.mount))
    return applied, needs_remount


def _differences(old: Struct, new: Struct) -> Iterator[str]:
    """The keys, as a file has them, on which two structs of one type differ."""
    for known in msgspec.structs.fields(old):
        if getattr(old, known.name) != getattr(new, known.name):
            yield known.encode_name
