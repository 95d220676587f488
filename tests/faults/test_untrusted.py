"""Files from strangers: none has code run, whichever way it asks, and none ends in anything but a message."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import EpsImagePlugin, Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from transformers import PreTrainedModel

from rewards.toys import ARCHITECTURE as CLIP_ARCHITECTURE
from simplear.cli import main
from simplear.evaluation import read_report
from simplear.evaluation.fid import picture_batches
from simplear.evaluation.publish import write_page
from simplear.generation.png import read_metadata
from simplear.language_model import load_checkpoint
from simplear.pictures import open_mask, read_rgb
from simplear.rewards import load_clip
from simplear.visual_tokenizer import load_visual_tokenizer
from visual_tokenizer.cosmos_files import Decoder, Encoder, write

MARK = "was-run"
"""A file that code of a stranger would leave in the working directory."""


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stranger.py").write_text(f"open({MARK!r}, 'w')\n\nclass Tokenizer:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("class_path", "init_args"),
    [
        ("subprocess.Popen", {"args": ["touch", MARK]}),
        ("os.system", {"command": f"touch {MARK}"}),
        ("builtins.open", {"file": MARK, "mode": "w"}),
        ("stranger.Tokenizer", {}),
        ("simplear.cli.main", {"arguments": ["data", "verify", "."]}),
        ("simplear.visual_tokenizer.load_visual_tokenizer", {"path": "."}),
        ("simplear.visual_tokenizer.Nothing", {}),
        ("torch.nn.Identity", {}),
        (["subprocess.Popen"], {}),
        (None, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["directory", "hub", "checkpoint"])
def test_a_visual_tokenizer_imports_nothing_that_its_file_names(
    where: str,
    class_path: Any,
    init_args: dict[str, Any],
    work: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = work / "tokenizer"
    directory.mkdir()
    config = {"class_path": class_path, "init_args": init_args, "fingerprint": "0"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes(b"")
    if where == "checkpoint":
        shutil.copytree(tiny_checkpoint, work / "checkpoint")
        shutil.copytree(directory, work / "checkpoint" / "visual_tokenizer")
        settings = json.loads((work / "checkpoint" / "simplear.json").read_text())
        changed = json.dumps({**settings, "visual_tokenizer": "visual_tokenizer"})
        (work / "checkpoint" / "simplear.json").write_text(changed)
        with pytest.raises(SystemExit) as ended:
            main(["generate", "checkpoint", "--prompt", "x", "--out", "out", "--device", "cpu"])
        assert ended.value.code == 2 and "No code is imported because a file names it" in capsys.readouterr().err
    else:
        monkeypatch.setattr("simplear.visual_tokenizer.checkpoint.snapshot_download", lambda *_, **__: str(directory))
        with pytest.raises(ValueError, match="No code is imported because a file names it"):
            load_visual_tokenizer("stranger/tokenizer" if where == "hub" else directory)
    assert not (work / MARK).exists()


def test_a_module_that_the_user_imports_registers_its_class(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "own_tokenizers.py").write_text(
        "from simplear.visual_tokenizer import FSQAutoencoder, register_visual_tokenizer\n\n\n"
        "@register_visual_tokenizer\nclass Own(FSQAutoencoder):\n    pass\n"
    )
    (work / "make.py").write_text(
        "from own_tokenizers import Own\nfrom simplear.visual_tokenizer import save_visual_tokenizer\n"
        "save_visual_tokenizer(Own([3, 3, 3], 8, decoder_channels=8, refine_channels=4), 'own')\n"
    )
    verify = ["data", "show", "shards", "--visual-tokenizer", "own", "--out", "page"]
    for extra, said in (
        (["--import", "nowhere"], "No module named 'nowhere'"),
        (["--import"], "expected one argument"),
    ):
        with pytest.raises(SystemExit):
            main([*verify, *extra])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--import", "make", *verify])
    assert load_visual_tokenizer("own").codebook_size == 27


class Saving(nn.Module):
    def forward(self, video: Tensor) -> Tensor:
        torch.ops.aten.save(video, "was-run")
        return video


class Mapping(nn.Module):
    def forward(self, video: Tensor) -> Tensor:
        return torch.from_file("was-run", True, 8)


class SavingWhenLoaded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    @torch.jit.export
    def __getstate__(self) -> tuple[int, bool]:
        return 1, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[int, bool]) -> None:
        self.training = state[1]
        torch.ops.aten.save(torch.ones(1), "was-run")

    def forward(self, video: Tensor) -> Tensor:
        return video


class Foreign(nn.Module):
    def forward(self, video: Tensor) -> Tensor:
        return torch.ops.quantized.add_relu(video, video, 1.0, 0)


@pytest.mark.parametrize("program", [Saving, Mapping, SavingWhenLoaded, Foreign])
def test_torchscript_that_could_reach_files_is_not_loaded(program: Callable[[], nn.Module], work: Path) -> None:
    """Although its hash is the one that the stranger states beside it."""
    for name, files in (("encoder", (program(), None)), ("decoder", (None, program()))):
        with pytest.raises(ValueError, match=rf"{name}\.jit names .* and was not loaded"):
            load_visual_tokenizer(write(work / name, *files))
    assert not (work / MARK).exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if program is SavingWhenLoaded:  # what an unguarded reader would have run: so the test tests something
            with pytest.raises(RuntimeError):
                torch.jit.load(work / "encoder" / "encoder.jit")
    assert (work / MARK).exists() == (program is SavingWhenLoaded)
    assert load_visual_tokenizer(write(work / "harmless", Encoder(), Decoder())).codebook_size == 64_000


def test_a_clip_model_cannot_ask_for_code_of_its_repository(work: Path) -> None:
    (work / "clip").mkdir()
    text = {**CLIP_ARCHITECTURE["text_cfg"], "hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    config = {"model_cfg": {**CLIP_ARCHITECTURE, "text_cfg": text}, "preprocess_cfg": {}}
    (work / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    (work / "clip" / "open_clip_model.safetensors").write_bytes(b"")
    loader = {"AutoTokenizer": ["stranger.Tokenizer", "stranger.Tokenizer"]}
    (work / "clip" / "tokenizer_config.json").write_text(json.dumps({"auto_map": loader}))
    with pytest.raises(ValueError, match="asks for trust_remote_code"):
        load_clip("clip")
    assert not (work / MARK).exists()


@pytest.mark.parametrize(
    "added",
    [
        {"auto_map": {"AutoConfig": "stranger.Tokenizer", "AutoModelForCausalLM": "stranger.Tokenizer"}},
        {"attn_implementation": "stranger/kernel"},
        {"_attn_implementation": "stranger/kernel"},
    ],
    ids=lambda added: next(iter(added)),
)
def test_a_checkpoint_names_no_code(
    added: dict[str, Any], tiny_checkpoint: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_checkpoint, work / "checkpoint")
    shutil.copy("stranger.py", work / "checkpoint")
    for file in ("config.json", "tokenizer_config.json"):
        content = json.loads((work / "checkpoint" / file).read_text())
        (work / "checkpoint" / file).write_text(json.dumps({**content, **added}))
    asked: list[Any] = []
    set_attention = PreTrainedModel._check_and_adjust_attn_implementation
    monkeypatch.setattr(
        PreTrainedModel,
        "_check_and_adjust_attn_implementation",
        lambda self, name, *rest, **more: (asked.append(name), set_attention(self, name, *rest, **more))[1],
    )
    assert load_checkpoint("checkpoint").model.max_positions == 96
    assert "stranger/kernel" not in asked and not (work / MARK).exists()


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("checkpoint/config.json", lambda: load_checkpoint("checkpoint")),
        ("checkpoint/simplear.json", lambda: load_checkpoint("checkpoint")),
        ("checkpoint/tokenizer_config.json", lambda: load_checkpoint("checkpoint")),
        ("checkpoint/generation_config.json", lambda: load_checkpoint("checkpoint")),
        ("visual/config.json", lambda: load_visual_tokenizer("visual")),
        ("report.json", lambda: read_report("report.json")),
        ("clip/open_clip_config.json", lambda: load_clip("clip")),
        ("out/scenes/a/settings.json", lambda: main(["compare", "report.json", "report.json"])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_json_that_is_nested_too_deep_is_an_error_that_names_the_file(
    file: str, read: Callable[[], Any], work: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_checkpoint, work / "checkpoint")
    (work / "clip").mkdir()
    (work / "clip" / "open_clip_model.safetensors").write_bytes(b"")
    runs, settings = {"a": {"overall": {"score": 1, "n": 1}}}, {"a": {"verdicts": "out/scenes/a/settings.json"}}
    (work / "report.json").write_text(json.dumps({"runs": runs, "settings": settings}))
    (work / file).parent.mkdir(parents=True, exist_ok=True)
    (work / file).write_text(DEEP)
    with pytest.raises((ValueError, SystemExit)) as ended:
        read()
    said = str(ended.value) if isinstance(ended.value, ValueError) else capsys.readouterr().err
    assert file.split("/")[0] in said and len(said) < 600, said


def test_a_picture_whose_metadata_are_nested_too_deep_has_none(work: Path) -> None:
    information = PngInfo()
    information.add_itxt("simplear", DEEP)
    Image.new("RGB", (8, 8)).save("deep.png", pnginfo=information)
    assert read_metadata("deep.png") is None


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    "door",
    [
        lambda: read_metadata("x.png"),
        lambda: read_rgb("x.png"),
        lambda: open_mask("x.png"),
        lambda: list(picture_batches([Path("x.png")], 1)),
        lambda: write_page("page.html", {"runs": {}}, "r", Path(), [{"file": "x.png", "prompt": "p"}]),
        lambda: main(["generate", "nowhere", "--prompt", "x", "--out", "o", "--image", "x.png", "--mask", "x.png"]),
        lambda: main(["evaluate", "tokenizer", "visual", "--out", "o", "--images", ".", "--rfid", "false"]),
    ],
    ids=["metadata", "read_rgb", "mask", "batches", "page", "generate", "tokenizer"],
)
def test_no_door_hands_a_picture_to_another_program(
    door: Callable[[], Any], work: Path, tiny_visual_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow opens EPS, whatever the file is called, by Ghostscript."""
    ran: list[Any] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **options: ran.append(arguments))
    shutil.copytree(tiny_visual_tokenizer, work / "visual")
    for name in ("x.png", "y.png"):
        (work / name).write_bytes(EPS)
    try:
        assert door() is None  # metadata
    except (ValueError, SystemExit) as error:
        assert "not a picture" in str(error) or isinstance(error, SystemExit)
    assert not ran
    with Image.open("x.png") as opened, contextlib.suppress(Exception):
        opened.load()
    assert ran, "an unguarded Image.open would have run it"
