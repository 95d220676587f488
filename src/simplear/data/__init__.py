"""Sources of pictures and captions, filters, recaptioning, token shards, the order of training, the DataModules."""

from simplear.data.jobs.captioners import Captioner, ServerCaptioner, TransformersCaptioner
from simplear.data.jobs.recaption import recaption
from simplear.data.jobs.text_tokenizer import train_text_tokenizer_on
from simplear.data.jobs.tokenize import tokenize
from simplear.data.prepare.crops import AspectBuckets, CentreCrop, Crop, RandomCrop
from simplear.data.prepare.filters import (
    AspectRatio,
    CaptionLength,
    Column,
    Filter,
    Listed,
    MinimumScore,
    PixelLimit,
    ShortEdge,
)
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
from simplear.data.sources.recaptioned import RecaptionedSource
from simplear.data.training.image_data import ImageDataModule
from simplear.data.training.token_data import TokenDataModule

__all__ = [
    "AspectBuckets",
    "AspectRatio",
    "CaptionLength",
    "Captioner",
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
    "RecaptionedSource",
    "Sample",
    "ScenesSource",
    "ServerCaptioner",
    "ShortEdge",
    "Source",
    "TokenDataModule",
    "TokenFilesSource",
    "TokenRow",
    "TokenShards",
    "TransformersCaptioner",
    "Unit",
    "WebDatasetSource",
    "merge_manifest",
    "recaption",
    "tokenize",
    "train_text_tokenizer_on",
    "write_shard",
]
