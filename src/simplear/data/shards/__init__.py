"""Token shards: tokenized images with their captions, as Arrow files that are read by memory map.

One picture, which was encoded to a grid of 32 × 32 codes, in unit ``00042``:

1. It is a `TokenRow` (`format`): key, codes (32, 32) uint16, captions, metadata, source. `rows_table` puts the rows of
   a unit into one Arrow table, each with a checksum of what training reads of it.
2. `write_shard` writes the table as ``00042.arrow``, and then ``00042.json``, the sidecar: rows, bytes,
   SHA-256, grids, drops. Each is written to a temporary name, synced and renamed. A shard with its sidecar is
   committed, whatever was killed when, and a run that goes on later leaves it as it is.
3. ``settings.json`` says what the codes were made with. A run with other settings is refused (`claim_directory`). When
   all units are committed, `merge_manifest` writes ``manifest.json`` from the sidecars, so that a set is finished when
   it has a manifest.
4. What was left out is listed in ``drops.parquet``, by key and reason (`drops`).
5. Training opens the directory as `TokenShards` (`reader`), which reads the manifest and compares file sizes. Row
   26,017 is found by a search in the list of shards and read from the mapped file. Its checksum is compared whenever
   it is read: damaged rows are never trained on, and no start waits until 88 GB are hashed. The rows of one grid are
   a `Bucket`.

Three verbs work on finished sets: `verify` compares every byte with its checksum and changes nothing; `repair` moves
damaged shards aside, so that the command that made them makes exactly those again; `show` writes a page of some rows
and counts. Files of prompts open as rows with an empty grid.

Format and reader know nothing of pictures, of text tokenizers or of the order of training.
"""

from simplear.data.shards.format import (
    MANIFEST_FILE,
    MAX_CODEBOOK_SIZE,
    SETTINGS_FILE,
    Grid,
    TokenRow,
    claim_directory,
    commit,
    committed_sidecar,
    is_committed,
    merge_manifest,
    read_json,
    settings_digest,
    settings_of,
    write_json,
    write_shard,
)
from simplear.data.shards.reader import Bucket, RowBatch, TokenShards, read_manifest

__all__ = [
    "MANIFEST_FILE",
    "MAX_CODEBOOK_SIZE",
    "SETTINGS_FILE",
    "Bucket",
    "Grid",
    "RowBatch",
    "TokenRow",
    "TokenShards",
    "claim_directory",
    "commit",
    "committed_sidecar",
    "is_committed",
    "merge_manifest",
    "read_json",
    "read_manifest",
    "settings_digest",
    "settings_of",
    "write_json",
    "write_shard",
]
