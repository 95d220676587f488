"""From pictures and captions to training batches, in five rooms over one ground file.

A room imports only from the rooms below it, and `import-linter` checks that. Each describes in its ``__init__`` how one
picture passes through it; together they are the whole way.

| room        | what happens to a picture there                                                             |
|-------------|---------------------------------------------------------------------------------------------|
| `sources/`  | it is found in a folder, tar, table or drawing, and becomes a `Sample`, not decoded yet      |
| `prepare/`  | filters keep or drop it; it is decoded and cropped to pixels                                 |
| `jobs/`     | `tokenize` has it encoded, `recaption` has it described; also texts and the text tokenizer   |
| `shards/`   | its codes and captions are a row on disk, which can be verified, repaired and shown          |
| `training/` | it is in global batch g of epoch e, with one of its captions, as a token sequence            |

`jobs` and `training` are on top and do not know of each other, since all that passes between them is on disk. Below
them are `sources` and `prepare`, then `shards`, and then `sample`: what a sample is, and how one is dropped.

What users name in YAML or import is listed here: ``simplear.data.WebDatasetSource``, ``simplear.data.ShortEdge``.
"""

from simplear.data.jobs.captioners import Captioner, ServerCaptioner, TransformersCaptioner
from simplear.data.jobs.recaption import recaption
from simplear.data.jobs.text_tokenizer import train_text_tokenizer_on
from simplear.data.jobs.tokenize import tokenize
from simplear.data.prepare.crops import AspectBuckets, CentreCrop, Crop
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
from simplear.data.sample import Sample
from simplear.data.shards import TokenRow, TokenShards, merge_manifest, write_shard
from simplear.data.sources.base import Source, Unit
from simplear.data.sources.folders import ImageFolderSource
from simplear.data.sources.hugging_face import HuggingFaceSource
from simplear.data.sources.recaptioned import RecaptionedSource
from simplear.data.sources.scenes import ScenesSource
from simplear.data.sources.tars import WebDatasetSource
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
    "RecaptionedSource",
    "Sample",
    "ScenesSource",
    "ServerCaptioner",
    "ShortEdge",
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
