"""Rows of a dataset on the hub, streamed with the ``datasets`` library (extra ``hub``): nothing is stored here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrm_text.contracts import UserError
from hrm_text.data.sources.upstream import Hub
from hrm_text.data.sources.upstream_files import BadRow, NumberedRow, OnBad, select_columns


@dataclass(frozen=True, slots=True)
class HubShard:
    """One of the shards of a split."""

    hub: Hub
    revision: str
    """The commit that is read, the same for all shards; of a local folder, a digest of what lies in it."""
    index: int
    shards: int

    @property
    def name(self) -> str:
        below = f"{self.hub.config}/" if self.hub.config else ""
        return f"{below}{self.hub.split}-{self.index:05d}-of-{self.shards:05d}"


def hub_shards(hub: Hub) -> list[HubShard]:
    """The shards of a dataset as it stands on the hub now.

    Raises:
        UserError: ``datasets`` is not installed, or the hub does not give the dataset.
    """
    revision = _revision(hub)
    count = max(1, _stream(hub, revision).num_shards)
    return [HubShard(hub, revision, index, count) for index in range(count)]


def read_hub_rows(shard: HubShard, columns: Mapping[str, str], on_bad: OnBad) -> Iterator[NumberedRow]:
    """The usable rows of a shard, as ``upstream_files.read_rows`` gives those of a file.

    Raises:
        UserError: the hub does not give the dataset.
    """
    stream = _stream(shard.hub, shard.revision)
    if stream.num_shards > 1:
        stream = stream.shard(num_shards=shard.shards, index=shard.index)
    line = 0
    rows = iter(stream)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # of the network, the hub or a file: the library has no class for them all
            raise _unreachable(shard.hub, f"{shard.name}, after row {line:,}: {error}") from error
        line += 1
        usable = select_columns(row, columns)
        if isinstance(usable, str):
            on_bad(BadRow(line, usable))
        else:
            yield NumberedRow(line, usable)


def _stream(hub: Hub, revision: str) -> Any:
    datasets = _library()
    is_local = Path(hub.repo).is_dir()
    try:
        return datasets.load_dataset(
            hub.repo,
            hub.config,
            data_files=list(hub.data_files) or None,
            split=hub.split,
            streaming=True,
            revision=None if is_local else revision,
        )
    except Exception as error:
        raise _unreachable(hub, str(error)) from error


def _revision(hub: Hub) -> str:
    """What decides whether the dataset is still the one that was read."""
    _library()
    folder = Path(hub.repo)
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        listing = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return hashlib.sha256(repr(listing).encode()).hexdigest()
    from huggingface_hub import HfApi  # which ``datasets`` brings

    try:
        return str(HfApi().dataset_info(hub.repo).sha)
    except Exception as error:
        raise _unreachable(hub, str(error)) from error


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "reading from the hub needs something that is not installed: pip install 'hrm-text[hub]'\n"
            "Or fetch the files yourself and name their folder with --from"
        ) from None
    return datasets


def _unreachable(hub: Hub, why: str) -> UserError:
    return UserError(
        f"the dataset {hub.repo} cannot be read from the hub: {why.strip()}\n"
        "Run the same command again to go on where it stopped, or fetch the files and name their folder with --from"
    )
