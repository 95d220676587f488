"""Sources of pictures and captions, token shards, the order of training data, and the two DataModules."""

from simplear.data.captions import train_text_tokenizer_on
from simplear.data.images import ImageDataModule
from simplear.data.shards import TokenRow, TokenShards, merge_manifest, write_shard
from simplear.data.sources import ImageFolderSource, Sample, ScenesSource, Source, Unit, WebDatasetSource
from simplear.data.tokenization import tokenize
from simplear.data.tokens import TokenDataModule

__all__ = [
    "ImageDataModule",
    "ImageFolderSource",
    "Sample",
    "ScenesSource",
    "Source",
    "TokenDataModule",
    "TokenRow",
    "TokenShards",
    "Unit",
    "WebDatasetSource",
    "merge_manifest",
    "tokenize",
    "train_text_tokenizer_on",
    "write_shard",
]
