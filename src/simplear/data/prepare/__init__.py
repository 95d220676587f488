"""What happens to a sample before it is encoded: filters, decoding, a crop.

One picture, 1600 × 1200 pixels, in a tokenization to 512 × 512 with the filters ``PixelLimit(100_000_000)``,
``ShortEdge(1024)`` and ``MinimumScore(CLIPReward(), 0.2)``. A loader process calls a `Preparation` with its sample:

1. A sample without a caption is dropped. So is a second one of the same key in a unit, before it comes here.
2. The filters run in their order (`filters`). The first two read the size from the header: 1.9 million pixels and a
   short edge of 1200 pass. A filter drops a sample by raising `Drop` with its reason. All filters have different
   reasons, so the counts say how many samples each one dropped.
3. Only now the picture is decoded to RGB (`Sample.image`). One that is broken, or cut short, is dropped here.
4. A crop makes it the size that is encoded (`crops`): `CentreCrop` takes the middle, 1200 × 1200, as that has the
   aspect asked for, and resizes it to 512 × 512 by Lanczos. `AspectBuckets` takes the grid nearest the picture's shape
   in place of one fixed size.
5. The result is an array (512, 512, 3) of uint8, for the encoder's next batch of that size.
6. `MinimumScore` needs the cropped picture and a reward, so it runs on the encoder's device, beside the encoder.

All of this follows from the sample alone. So the shards do not depend on the number of processes, nor on how often
they were stopped. Pictures smaller than the size asked for are enlarged, unless a filter drops them. Nothing here
knows of sources, encoders or files of shards.
"""
