"""Work on a whole corpus, on any number of processes, which can be stopped and run again.

One picture through `tokenize`, on four GPUs:

1. `tokenize` claims the directory for its settings: tokenizer, source, size, filters. Then it starts one process a GPU
   with Lightning's Fabric (`units`).
2. Each rank takes every fourth of the units that have no committed shard yet. Unit ``00042`` is rank 1's, say.
3. A loader process of that rank reads the unit from its source and prepares each sample; 64 pictures of one size are a
   `UnitBatch`. A batch never reaches over the end of a unit. The last one is empty, and says what was dropped.
4. `TokenizeJob` encodes the batch: pixels (64, 3, 512, 512) in [-1, 1] to codes (64, 32, 32). A `MinimumScore` drops
   pictures that score too low just before.
5. The rows are held until the last batch of the unit. Then the list of drops is written, and then the shard, which
   commits the unit. A rank that is killed loses only the units that it had begun.
6. All ranks wait for each other (`RanksTogether`: for as long as it takes, but not for one that has died). The first
   writes the manifest and ``drops.parquet``.

`recaption` runs in the same way (`RecaptionJob`). A `Captioner` (`captioners`: a model through transformers, or a
server) is asked for a long and a short caption of each picture, and the unit is committed as a table, which
`RecaptionedSource` reads.

`texts` writes shards of text without images (``simplear data text``), in one process. `text_tokenizer` trains a
byte-level BPE on the captions of a source.
"""
