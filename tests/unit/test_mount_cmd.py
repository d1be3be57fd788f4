"""Which configuration the options of `kvfs mount` make."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvfs.errors import UsageError
from kvfs.tools.mount_cmd import effective_config


def test_a_file_is_known_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = f'[[tier]]\nname = "a"\nmedium = "nvme"\npath = "{tmp_path}/a"\ncapacity = 1\n'
    (tmp_path / "kvfs.toml").write_text(tier)
    monkeypatch.chdir(tmp_path)
    # A daemon reads it again on a reload, from another working directory.
    assert effective_config(Path("kvfs.toml"), ()).source == str(tmp_path / "kvfs.toml")


def test_without_options_the_directory_of_the_default_tier_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    (tier,) = effective_config(None, ()).tier
    assert tier.path == tmp_path / "kvfs" / "default"
    assert tier.path.is_dir()


def test_a_file_and_tiers_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        effective_config(Path("kvfs.toml"), ["nvme=/srv/a,capacity=1GiB"])
