"""Where pictures and captions come from: drawn scenes, folders, WebDataset tars, Hugging Face data sets, token files.

`base` says what a source is; each other module holds one. Left out: downloads of pictures by their addresses, which
img2dataset does.
"""

from simplear.data.sources.base import (
    CAPTION_KEYS,
    IndexedSource,
    Sample,
    Source,
    Unit,
    captions_and_metadata,
)
from simplear.data.sources.folders import ImageFolderSource
from simplear.data.sources.hugging_face import HuggingFaceSource
from simplear.data.sources.scenes import ScenesSource
from simplear.data.sources.tars import WebDatasetSource
from simplear.data.sources.token_files import TokenFilesSource

__all__ = [
    "CAPTION_KEYS",
    "HuggingFaceSource",
    "ImageFolderSource",
    "IndexedSource",
    "Sample",
    "ScenesSource",
    "Source",
    "TokenFilesSource",
    "Unit",
    "WebDatasetSource",
    "captions_and_metadata",
]
