"""A vision-language model that answers yes/no questions about images, deterministically.

The model sees the image and the question in its own chat format. Instead of a sampled reply, the probability that its
reply begins with a "yes" is compared with that of a "no", so no answer has to be parsed and none is invalid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from simplear.errors import MissingFileError, UserError, first_line

EXAMPLE = "a model that chats about images, such as Qwen/Qwen2-VL-7B-Instruct (--judge)"
INSTRUCTION = "{question} Answer with yes or no."
YES = ("yes", "Yes", "YES", " yes", " Yes")
NO = ("no", "No", "NO", " no", " No")
"""How a reply may begin; those that are one token of the model's count."""


def load_complete(loader: Any, model: str, what: str, **options: Any) -> Any:
    """A frozen model of transformers, in evaluation mode.

    Raises:
        ValueError: the files cannot be read, or weights are missing, which transformers would draw at random.
    """
    try:
        network, loading = loader.from_pretrained(model, trust_remote_code=False, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{model} is not {what} ({first_line(error)}).") from error
    # Buffers, such as a loss's, can be absent from the file.
    missing = {name for name, _ in network.named_parameters()} & {*loading["missing_keys"]}
    if missing:
        raise UserError(f"{model} is not {what}: {len(missing)} weights are missing, such as {min(missing)}.")
    return network.eval().requires_grad_(False)


def judge_processor(model: str) -> Any:
    """The processor of a judge; a quick check before the model itself is loaded. Errors: see `VisualJudge`."""
    try:
        processor: Any = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    except OSError as error:
        raise MissingFileError(
            f"the judge {model} is not here and could not be downloaded ({first_line(error)}): download it where "
            "there is a network, and name its directory (--judge)."
        ) from error
    except ValueError as error:
        raise UserError(f"{model} is not {EXAMPLE} ({first_line(error)}).") from error
    if getattr(processor, "chat_template", None) is None or not hasattr(processor, "image_processor"):
        raise UserError(f"{model} is not {EXAMPLE}: it has no chat template or takes no images.")
    if not _tokens(processor, YES) or not _tokens(processor, NO):
        raise UserError(f"{model} is not {EXAMPLE}: its tokenizer has no token for yes or for no.")
    processor.tokenizer.padding_side = "left"  # so that each row ends where the reply begins
    return processor


def _tokens(processor: Any, words: Sequence[str]) -> list[int]:
    encoded = [processor.tokenizer.encode(word, add_special_tokens=False) for word in words]
    return sorted({ids[0] for ids in encoded if len(ids) == 1} - {processor.tokenizer.unk_token_id})


class VisualJudge:
    """Yes or no for pairs of image and question.

    Args:
        model: directory or hub id of a chat model that `transformers.AutoModelForImageTextToText` loads, such as
            Qwen2-VL, with its processor.
        batch_size: questions answered at once.

    Raises:
        FileNotFoundError: it is neither here nor could it be downloaded.
        ValueError: the files hold another kind of model, its processor has no chat format, or its tokenizer has no
            token for yes or no.
    """

    def __init__(self, model: str, batch_size: int = 16) -> None:
        self.batch_size = batch_size
        self.processor = judge_processor(model)
        self.network = load_complete(AutoModelForImageTextToText, model, EXAMPLE, dtype="auto")
        self.yes, self.no = (_tokens(self.processor, words) for words in (YES, NO))

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[bool]:
        """Whether each question is answered "yes" for the image at its place."""
        return [margin > 0 for margin in self.margins(images, questions).tolist()]

    @torch.no_grad()
    def margins(self, images: Sequence[Image.Image], questions: Sequence[str]) -> Tensor:
        """Log-probability of "yes" less that of "no", (B,) float32 on the CPU: the answer is "yes" above 0.

        Batches follow the order of the questions, so equal calls give equal numbers.
        """
        conversations = [
            [{"role": "user", "content": [_image(image), _text(INSTRUCTION.format(question=question))]}]
            for image, question in zip(images, questions, strict=True)
        ]
        found = []
        for start in range(0, len(conversations), self.batch_size):
            inputs = self.processor.apply_chat_template(
                conversations[start : start + self.batch_size],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            ).to(self.network.device)
            logits = self.network(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()
            found.append((logits[:, self.yes].logsumexp(dim=1) - logits[:, self.no].logsumexp(dim=1)).cpu())
        return torch.cat(found)


def _image(image: Image.Image) -> dict[str, Any]:
    return {"type": "image", "image": image}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
