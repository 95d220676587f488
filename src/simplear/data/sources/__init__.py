"""Where pictures and captions come from: drawn scenes, folders, WebDataset tars, Hugging Face data sets.

One picture, ``000017.jpg`` in the tar ``00042.tar`` of a `WebDatasetSource`:

1. ``units()`` lists the tars. Each is a `Unit`: a name (``00042``, which the token shard made of it will have), what
   the source needs to find it again, and an identity, a hash of both ends of the file. Tars may be added later; a tar
   that was replaced is noticed by its identity.
2. A job asks for the samples of one unit: ``read(unit, dropped)``. The tar is read once, in its order. Members of one
   name (``000017.jpg``, ``000017.txt``, ``000017.json``) are one sample.
3. The caption is a value of the .json ("captions", "caption" or "text"), or else the text of the .txt. Other values of
   the .json are metadata, which filters can ask for. All sources share these conventions, which are in `base`.
4. The `Sample` that is yielded holds the JPEG's bytes as a `PictureFile`. Nothing was decoded, so a filter that looks
   only at the size in the header, or at the captions, costs next to nothing.
5. If the picture had no caption, its key and the reason "no caption" are appended to ``dropped``. Nothing is left out
   without being listed.

A source whose samples have numbers is an `IndexedSource`, which `ImageDataModule` can read in any order.

`RecaptionedSource` wraps another source: the pictures are that one's, the captions those that `simplear recaption`
wrote, found by key.

A source of your own derives from `Source` (two methods) and is named by its class path. Left out: downloads of pictures
by their addresses, which img2dataset does.
"""
