"""From shards to training batches: the order of the data, the DataModules, and the position in the data.

One picture, row 26,017 of a set, in a pretraining with a global batch of 1,024 on 32 GPUs:

1. `TokenDataModule` opens the set. Rows of one grid are a bucket, since a batch has one shape.
2. Global batch g of epoch e is a pure function of (seed, e, g) (`order`): a permutation that is computed where it is
   asked, and held nowhere, gives the 1,024 positions. Training starts at once, however many rows there are.
3. `MicroBatchSampler` cuts the batch by accumulation step and rank. The picture is among the 32 rows of rank 5, say.
   On another number of ranks it would be in the same global batch.
4. `TokenBatches` reads the rows, and draws for each a caption, a prefix, and whether the caption is left out for
   guidance. These draws are hashes of (seed, epoch, row), so that they too depend on nothing else.
5. `simplear.sequence` makes ``input_ids`` and ``labels`` of it. The batch goes to the stage with its running number.
6. When the step has ended, the DataModule's position is g + 1 (`ordered_data`). It is saved in Lightning's checkpoint,
   so a run that is resumed takes batch g + 1 next, also with another accumulation or world size.

With ``weights`` a batch has rows of several sets in given shares (`mixing`).

`ImageDataModule` has the same order and position over pictures in place of codes, for the visual tokenizer and for
CLIP; it needs no shards. To train in another way on the same order, derive from `OrderedDataModule`.
"""
