"""A vision-language model that answers yes/no questions about images, the same way each time.

The model is shown the image and the question in its own chat format and is not asked to write: the probability that
its reply begins with a "yes" is compared with that of a "no". So nothing is sampled, no answer has to be parsed, and
there is none that is neither.

Left out: sharing the image's part between its questions; each is a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from simplear.errors import MissingFileError, UserError, first_line

EXAMPLE = "model that chats about images, such as Qwen/Qwen2-VL-7B-Instruct (--judge)"
INSTRUCTION = "{question} Answer with yes or no."
YES = ("yes", "Yes", "YES", " yes", " Yes")
NO = ("no", "No", "NO", " no", " No")
"""How a reply may begin; those count that are one token of the model's."""


def judge_processor(model: str) -> Any:
    """The processor of a judge, held against what a judge needs: a quick look beforehand. Errors: see `VisualJudge`."""
    try:
        processor: Any = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    except OSError as error:
        raise MissingFileError(
            f"the judge {model} is not here and could not be downloaded ({first_line(error)}): download it where "
            "there is a network, and name its directory (--judge)."
        ) from error
    except ValueError as error:
        raise UserError(f"{model} is no {EXAMPLE} ({first_line(error)}).") from error
    if getattr(processor, "chat_template", None) is None or not hasattr(processor, "image_processor"):
        raise UserError(f"{model} is no {EXAMPLE}: it has no chat template or takes no images.")
    for words in (YES, NO):
        if not _tokens(processor, words):
            raise UserError(f"{model} is no {EXAMPLE}: its tokenizer has no token for any of {words}.")
    processor.tokenizer.padding_side = "left"  # so that the last place of each row is where the reply begins
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
        ValueError: the files hold no such model, its processor has no chat format, or its tokenizer has no token for
            yes or no.
    """

    def __init__(self, model: str, batch_size: int = 16) -> None:
        self.batch_size = batch_size
        self.processor = judge_processor(model)
        try:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                model, dtype="auto", trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{model} is no {EXAMPLE} ({first_line(error)}).") from error
        network, report = loaded
        if missing := report["missing_keys"] or report["mismatched_keys"]:
            raise UserError(
                f"the weights of the judge {model} are incomplete: {len(missing)} are missing or of another shape, "
                f"such as {sorted(map(str, missing))[0]}."
            )
        self.network: Any = network.eval().requires_grad_(False)
        self.yes, self.no = (_tokens(self.processor, words) for words in (YES, NO))

    def to(self, device: torch.device | str) -> VisualJudge:
        """Bring the model to a device."""
        self.network.to(device)
        return self

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[bool]:
        """Whether each question is answered "yes" of the image at its place."""
        return [margin > 0 for margin in self.margins(images, questions).tolist()]

    @torch.no_grad()
    def margins(self, images: Sequence[Image.Image], questions: Sequence[str]) -> Tensor:
        """Log-probability of "yes" less that of "no", (B,) float32 on CPU: the answer is "yes" above 0.

        Batches follow the order of the questions, so equal calls give equal numbers.
        """
        pairs = list(zip(images, questions, strict=True))
        parts = [
            self._margins(pairs[start : start + self.batch_size]) for start in range(0, len(pairs), self.batch_size)
        ]
        return torch.cat(parts)

    def _margins(self, pairs: Sequence[tuple[Image.Image, str]]) -> Tensor:
        conversations = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": image},
                        {"type": "text", "text": INSTRUCTION.format(question=question)},
                    ],
                }
            ]
            for image, question in pairs
        ]
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.network.device)
        logits = self.network(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()
        return (logits[:, self.yes].logsumexp(dim=1) - logits[:, self.no].logsumexp(dim=1)).cpu()
