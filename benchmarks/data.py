"""Token shards against one ``.npy`` and one ``.txt`` a sample, mixing, memory, starting up, and making the shards.

Pairs: what `TokenDataModule`'s dataset does for a micro-batch up to the text tokenizer (numbers of rows, codes as
int64, the epoch's caption, keys and metadata) against `np.load` and `open` of the same samples, both by random access
with the files in the page cache. `datasets` on the same shards stands beside them.

Start-up: `TokenDataModule.setup` and its first batch over rows of 64 codes, with the same number of rows in each shard.
The shards of a directory are copies of one, for opening reads no rows; each is a file of its own on disk.

Mixing: batches of the same rows as one set and as four with weights, the order's arithmetic included, before the text
tokenizer. Memory: what the process holds by itself (`RssAnon`; mapped pages of the files are the system's to take back)
after a tenth of an epoch of whole training batches and at its end, in a process of its own.

Tokenizing: all of `simplear tokenize` on a tar of JPEGs, from opening it to the manifest, against the same encoder on
the same pixels in memory. The encoder has the shape that `configs/paper/visual_tokenizer.yaml` gives it.

    python benchmarks/data.py            # some minutes and 3 GB of temporary files, removed afterwards
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from measure import Runs, alternate, claim, median, parser, publish, ratios, resident_anonymous
from simplear.data import (
    TokenDataModule,
    TokenRow,
    TokenShards,
    WebDatasetSource,
    merge_manifest,
    tokenize,
    write_shard,
)
from simplear.data.prepare.crops import resize_and_crop
from simplear.data.shards import claim_directory, write_json
from simplear.data.training.order import Batch
from simplear.data.training.ordered_data import MicroBatchSampler
from simplear.data.training.token_data import TokenBatches
from simplear.hashing import Int64
from simplear.language_model import train_text_tokenizer
from simplear.visual_tokenizer import FSQAutoencoder

CODEBOOK = 64_000
SMALL_GRID = (8, 8)
MIX = [0.5, 0.3, 0.15, 0.05]
"""Weights of the sets of a mix."""
TOKENIZE_BATCH = 16
WORDS = ["a", "photo", "of", "one", "red", "apple", "beside", "two", "blue", "cups", "under", "morning", "light"]

Pairs = tuple[torch.Tensor, list[str]]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "data")
    made.add_argument("--samples", type=int, default=10_000, help="for the pairs")
    made.add_argument("--grid", type=int, default=32, help="codes along each side, for the pairs")
    made.add_argument("--batch-size", type=int, default=256)
    made.add_argument("--batches", type=int, default=8, help="read in each round")
    made.add_argument("--rounds", type=int, default=11)
    made.add_argument("--startup-rows", type=int, nargs=2, default=[1_000_000, 10_000_000])
    made.add_argument("--shard-rows", type=int, default=100_000, help="rows of each shard, for the start-up")
    made.add_argument("--mix-batches", type=int, default=24, help="read in each round, for the mix")
    made.add_argument("--pictures", type=int, default=48, help="to tokenize")
    made.add_argument("--picture-size", type=int, default=256, help="pixels along each side, for tokenizing")
    made.add_argument("--encoder-channels", type=int, default=512)
    made.add_argument("--tokenize-rounds", type=int, default=5)
    made.add_argument("--directory", help="for the temporary files; the system's by default")
    chosen = made.parse_args(argv)
    if chosen.quick:
        chosen.samples, chosen.grid, chosen.batch_size, chosen.batches, chosen.rounds = 64, 4, 8, 2, 3
        chosen.startup_rows, chosen.shard_rows = [2_000, 20_000], 1_000
        chosen.mix_batches, chosen.pictures, chosen.picture_size = 4, 8, 32
        chosen.encoder_channels, chosen.tokenize_rounds = 16, 1
    return chosen


def caption(number: int) -> str:
    """Some sixty letters that name the sample."""
    generator = np.random.default_rng(number)
    return f"{' '.join(generator.choice(WORDS, 12))} {number}"


def write_shards(directory: Path, rows: int, grid: tuple[int, int], shard_rows: int, different: bool) -> Path:
    """A finished directory of shards of random codes, all with the same rows or each with its own."""
    settings = {"visual_tokenizer": "0" * 64, "codebook_size": CODEBOOK, "downsample": 16}
    claim_directory(directory, settings)
    names = [f"unit{number:05d}" for number in range(rows // shard_rows)]
    for number, name in enumerate(names):
        if number == 0 or different:
            codes = np.random.default_rng(number).integers(0, CODEBOOK, (shard_rows, *grid), dtype=np.uint16)
            first = number * shard_rows
            made = [TokenRow(f"{first + n:09d}", codes[n], [caption(first + n)], {}, name) for n in range(shard_rows)]
            write_shard(directory, name, made)
        else:
            shutil.copyfile(directory / f"{names[0]}.arrow", directory / f"{name}.arrow")
            sidecar = json.loads((directory / f"{names[0]}.json").read_text())
            write_json(directory / f"{name}.json", sidecar | {"file": f"{name}.arrow"})
    merge_manifest(directory, names)
    return directory


def write_files(directory: Path, shards: Path) -> Path:
    """The same samples as one ``.npy`` and one ``.txt`` each."""
    directory.mkdir()
    opened = TokenShards(shards)
    for number in range(len(opened)):
        row = opened.read(np.array([number]))
        np.save(directory / f"{row.keys[0]}.npy", row.codes[0])
        (directory / f"{row.keys[0]}.txt").write_text(row.captions[0][0], encoding="utf-8")
    return directory


def read_files(directory: str, rows: Int64) -> Pairs:
    """A batch of pairs from one ``.npy`` and one ``.txt`` each."""
    codes, captions = [], []
    for row in rows.tolist():
        codes.append(np.load(f"{directory}/{row:09d}.npy"))
        with open(f"{directory}/{row:09d}.txt", encoding="utf-8") as file:
            captions.append(file.read())
    return torch.from_numpy(np.stack(codes).astype(np.int64)), captions


def read_dataset_rows(rows_of: datasets.Dataset, grid: tuple[int, int], rows: Int64) -> Pairs:
    """A batch of pairs from `datasets`, row by row."""
    read = [rows_of[row] for row in rows.tolist()]
    codes = np.array([row["tokens"] for row in read], np.int64).reshape(-1, *grid)
    return torch.from_numpy(codes), [row["captions"][0] for row in read]


def read_dataset_batch(rows_of: datasets.Dataset, grid: tuple[int, int], rows: Int64) -> Pairs:
    """A batch of pairs from `datasets`, asked for at once; the dataset has NumPy's format."""
    read = rows_of[rows]
    codes = np.asarray(read["tokens"], np.int64).reshape(-1, *grid)
    return torch.from_numpy(codes), [str(captions[0]) for captions in read["captions"]]


def data_module(shards: Path, tokenizer: Path, batch_size: int) -> TokenDataModule:
    module = TokenDataModule(str(shards), batch_size, str(tokenizer))
    module.setup("fit")
    return module


def measure_pairs(settings: argparse.Namespace, directory: Path, tokenizer: Path) -> tuple[Runs, dict[str, float]]:
    """Seconds to read the same batches in four ways, and bytes a sample of two."""
    grid = (settings.grid, settings.grid)
    shards = write_shards(directory / "pairs", settings.samples, grid, settings.samples // 2, different=True)
    files = write_files(directory / "files", shards)
    batches = data_module(shards, tokenizer, settings.batch_size).training
    assert isinstance(batches, TokenBatches)
    table = datasets.concatenate_datasets([datasets.Dataset.from_file(str(f)) for f in sorted(shards.glob("*.arrow"))])
    formatted = table.select_columns(["tokens", "captions"]).with_format("numpy")

    def read_shards(rows: Int64) -> Pairs:
        _, codes, captions = batches.read(Batch(0, 0, 0, rows))
        return codes, captions

    readers: dict[str, Callable[[Int64], Pairs]] = {
        "shards": read_shards,
        "files": lambda rows: read_files(str(files), rows),
        "datasets, row by row": lambda rows: read_dataset_rows(table, grid, rows),
        "datasets, by batch": lambda rows: read_dataset_batch(formatted, grid, rows),
    }
    order = np.random.default_rng(0).integers(0, settings.samples, (settings.batches, settings.batch_size))
    expected = read_shards(order[0])
    for name, reader in readers.items():
        got = reader(order[0])
        if not (torch.equal(got[0], expected[0]) and got[1] == expected[1]):
            raise AssertionError(f"{name} reads other pairs than the shards: the comparison means nothing.")

    def read_one_after_another(reader: Callable[[Int64], Pairs]) -> None:
        for rows in order:
            reader(rows)  # and dropped before the next, as training does

    variants = {name: lambda reader=reader: read_one_after_another(reader) for name, reader in readers.items()}
    runs = alternate(variants, settings.rounds, "pairs", balance=True)
    return runs, {
        "shards": sum(file.stat().st_size for file in shards.iterdir()) / settings.samples,
        "files": sum(file.stat().st_size for file in files.iterdir()) / settings.samples,
        "files_allocated": sum(file.stat().st_blocks * 512 for file in files.iterdir()) / settings.samples,
    }


def measure_mix(settings: argparse.Namespace, directory: Path, tokenizer: Path) -> Runs:
    """Seconds to read as many batches of one set, and of four that hold as many rows."""
    grid = (settings.grid, settings.grid)
    one = write_shards(directory / "one", settings.samples, grid, settings.samples // 4, different=True)
    sets = []
    for number in range(len(MIX)):
        part = directory / f"mix{number}"
        claim_directory(part, json.loads((one / "settings.json").read_text()))
        name = f"unit{number:05d}"
        for suffix in (".arrow", ".json"):
            (part / f"{name}{suffix}").hardlink_to(one / f"{name}{suffix}")
        merge_manifest(part, [name])
        sets.append(str(part))
    variants: dict[str, Callable[[], object]] = {}
    for name, paths, weights in (("one set", str(one), None), ("mix", sets, MIX)):
        module = TokenDataModule(paths, settings.batch_size, str(tokenizer), weights=weights)
        module.setup("fit")
        batches = module.training
        assert isinstance(batches, TokenBatches)
        sampler = MicroBatchSampler(batches.order(settings.batch_size, 0, True, "rows"), endless=True)

        def read_batches(batches: TokenBatches = batches, sampler: MicroBatchSampler = sampler) -> None:
            for micro_batch in itertools.islice(sampler, settings.mix_batches):
                batches.read(micro_batch)

        variants[name] = read_batches
    return alternate(variants, settings.rounds, "mix", balance=True)


def measure_memory(settings: argparse.Namespace, directory: Path, tokenizer: Path) -> list[int]:
    """Bytes that a process holds by itself after each tenth of an epoch of whole training batches."""
    process = os.fork()  # so that nothing of the other measurements is given back meanwhile
    held_file = directory / "held.json"
    if process == 0:
        torch.set_num_threads(1)
        loader = data_module(directory / "one", tokenizer, settings.batch_size).train_dataloader()
        every = max(len(loader) // 10, 1)
        held = [resident_anonymous() for number, _ in enumerate(loader, start=1) if number % every == 0]
        held_file.write_text(json.dumps(held))
        os._exit(0)
    if os.waitpid(process, 0)[1] != 0:
        raise RuntimeError("the process whose memory was measured failed.")
    return json.loads(held_file.read_text())


def measure_tokenizing(settings: argparse.Namespace, directory: Path) -> Runs:
    """Seconds of `simplear tokenize` and of its encoder alone, for the same pictures."""
    size, count = settings.picture_size, settings.pictures
    torch.manual_seed(0)
    encoder = FSQAutoencoder([8, 8, 8, 5, 5, 5], 16, encoder_channels=settings.encoder_channels, encoder_blocks=4,
                             encoder_kernel=3, decoder_channels=8, refine_channels=4)  # fmt: skip
    encoder.eval()
    random = np.random.default_rng(0)
    tar = directory / "pictures.tar"
    with tarfile.open(tar, "w") as opened:
        for number in range(count):
            # Smooth noise, a quarter larger than it is cropped to: JPEGs of usual size and decoding time.
            noise = random.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8)
            picture = Image.fromarray(noise).resize((size * 5 // 4, size * 5 // 4), Image.Resampling.BICUBIC)
            content = io.BytesIO()
            picture.save(content, "JPEG", quality=92)
            for name, data in ((f"{number:06d}.jpg", content.getvalue()), (f"{number:06d}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                opened.addfile(member, io.BytesIO(data))
    source = WebDatasetSource(str(tar))
    samples = list(source.read(source.units()[0], []))
    pictures = torch.from_numpy(np.stack([resize_and_crop(sample.image, size, size) for sample in samples]))

    def encode() -> None:
        with torch.inference_mode():
            for part in pictures.split(TOKENIZE_BATCH):
                # Channels last, as pictures come: on CPUs the encoder is faster so.
                encoder.encode(part.permute(0, 3, 1, 2).float() / 127.5 - 1)

    def tokenize_all() -> None:
        out = directory / "tokenized"
        tokenize(
            source=source, visual_tokenizer=encoder, out=str(out), height=size, width=size, batch_size=TOKENIZE_BATCH,
            num_workers=1, accelerator="cpu",
        )  # fmt: skip
        shutil.rmtree(out)

    return alternate({"encoder alone": encode, "tokenize": tokenize_all}, settings.tokenize_rounds, "tokenize")


def measure_startup(settings: argparse.Namespace, directory: Path, tokenizer: Path) -> tuple[Runs, float]:
    """Seconds to open each corpus and to its first batch, and bytes a row of 64 codes."""
    small, large = settings.startup_rows
    needed = (small + large) * 300
    if (free := shutil.disk_usage(directory).free) < needed:
        raise OSError(f"{directory} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} are needed: give --directory.")
    corpora = {
        rows: write_shards(directory / f"startup-{rows}", rows, SMALL_GRID, settings.shard_rows, different=False)
        for rows in (small, large)
    }
    variants: dict[str, Callable[[], object]] = {}
    for size, rows in (("small", small), ("large", large)):
        variants[f"open, {size}"] = lambda rows=rows: TokenShards(corpora[rows]).bucket(SMALL_GRID)
        variants[f"first batch, {size}"] = lambda rows=rows: next(
            iter(data_module(corpora[rows], tokenizer, settings.batch_size).train_dataloader())
        )
    runs = alternate(variants, settings.rounds, "start-up", balance=True)
    size = sum(file.stat().st_size for file in corpora[large].iterdir()) / large
    return runs, size


def main(argv: Sequence[str] | None = None) -> None:
    settings = arguments(argv)
    with tempfile.TemporaryDirectory(dir=settings.directory, prefix="simplear-benchmark-") as name:
        directory = Path(name)
        tokenizer = directory / "text_tokenizer"
        train_text_tokenizer((caption(number) for number in range(1000)), 400, tokenizer)
        pairs, sizes = measure_pairs(settings, directory, tokenizer)
        mix = measure_mix(settings, directory, tokenizer)
        memory = measure_memory(settings, directory, tokenizer)
        tokenizing = measure_tokenizing(settings, directory)
        startup, small_size = measure_startup(settings, directory, tokenizer)
    small, large = settings.startup_rows
    codes = settings.grid**2
    claims = [
        claim(
            f"pairs a second of {codes:,} codes, token shards over .npy + .txt",
            ratios(pairs, "files", "shards"),
            (">=", 20),
        ),
        *(
            claim(f"the same, {way} over .npy + .txt", ratios(pairs, "files", way))
            for way in ("datasets, row by row", "datasets, by batch")
        ),
        claim(
            f"pairs a second, mix of {len(MIX)} sets over one set",
            ratios(mix, "one set", "mix"),
            (">=", 0.9),
        ),
        claim(
            "memory held at the end of an epoch over that after its first tenth",
            [memory[-1] / memory[0]],
            ("<=", 1.05),
            note=f"{memory[0] / 2**20:.0f} and {memory[-1] / 2**20:.0f} MiB",
        ),
        claim(
            "pictures a second, simplear tokenize over its encoder alone",
            ratios(tokenizing, "encoder alone", "tokenize"),
            (">=", 0.9),
            note=f"{settings.pictures} JPEGs to {settings.picture_size} px",
        ),
        claim(
            f"start-up with its first batch, {large:,} rows over {small:,}",
            ratios(startup, "first batch, large", "first batch, small"),
            note=f"{1e3 * median(startup['first batch, large']):.0f} ms, "
            f"{1e3 * median(startup['open, large']):.1f} ms of it to open {large // settings.shard_rows} shards",
        ),
        claim(
            f"bytes a sample of {codes:,} codes, token shards over .npy + .txt on disk",
            [sizes["shards"] / sizes["files_allocated"]],
            note=f"{sizes['shards']:.0f} and {sizes['files_allocated']:.0f}; {small_size:.0f} a sample of 64 codes",
        ),
    ]
    read = settings.batches * settings.batch_size
    details: dict[str, Any] = {
        "pairs_a_second": {way: read / median(runs) for way, runs in pairs.items()},
        "mix_seconds_a_batch": {way: median(runs) / settings.mix_batches for way, runs in mix.items()},
        "memory_bytes": memory,
        "seconds_a_picture": {way: median(runs) / settings.pictures for way, runs in tokenizing.items()},
        "startup_seconds": {way: median(runs) for way, runs in startup.items()},
        "bytes_a_sample": {**sizes, "shards_of_64_codes": small_size},
    }
    publish("data", settings, claims, details)


if __name__ == "__main__":
    main()
