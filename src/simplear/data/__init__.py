"""Sources of pictures and captions, filters, token shards, the order of training data, and the two DataModules."""

from simplear.data.captions import train_text_tokenizer_on
from simplear.data.crops import AspectBuckets, CentreCrop, Crop, RandomCrop
from simplear.data.filters import (
    AspectRatio,
    CaptionLength,
    Column,
    Filter,
    Listed,
    MinimumScore,
    PixelLimit,
    ShortEdge,
)
from simplear.data.images import ImageDataModule
from simplear.data.shards import TokenRow, TokenShards, merge_manifest, write_shard
from simplear.data.sources import (
    HuggingFaceSource,
    ImageFolderSource,
    Sample,
    ScenesSource,
    Source,
    TokenFilesSource,
    Unit,
    WebDatasetSource,
)
from simplear.data.tokenization import tokenize
from simplear.data.tokens import TokenDataModule

__all__ = [
    "AspectBuckets",
    "AspectRatio",
    "CaptionLength",
    "CentreCrop",
    "Column",
    "Crop",
    "Filter",
    "HuggingFaceSource",
    "ImageDataModule",
    "ImageFolderSource",
    "Listed",
    "MinimumScore",
    "PixelLimit",
    "RandomCrop",
    "Sample",
    "ScenesSource",
    "ShortEdge",
    "Source",
    "TokenDataModule",
    "TokenFilesSource",
    "TokenRow",
    "TokenShards",
    "Unit",
    "WebDatasetSource",
    "merge_manifest",
    "tokenize",
    "train_text_tokenizer_on",
    "write_shard",
]
