"""Sources of pictures and captions, recaptioning, token shards, the order of training data, and the two DataModules."""

from simplear.data.captioners import Captioner, ServerCaptioner, TransformersCaptioner
from simplear.data.captions import train_text_tokenizer_on
from simplear.data.images import ImageDataModule
from simplear.data.recaptioned import RecaptionedSource
from simplear.data.recaptioning import recaption
from simplear.data.shards import TokenRow, TokenShards, merge_manifest, write_shard
from simplear.data.sources import ImageFolderSource, Sample, ScenesSource, Source, Unit, WebDatasetSource
from simplear.data.tokenization import tokenize
from simplear.data.tokens import TokenDataModule

__all__ = [
    "Captioner",
    "ImageDataModule",
    "ImageFolderSource",
    "RecaptionedSource",
    "Sample",
    "ScenesSource",
    "ServerCaptioner",
    "Source",
    "TokenDataModule",
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
