"""Describe a picture in words: a vision-language model through transformers, or a server of one.

A captioner takes pictures and one prompt and gives an answer for each picture, decoded greedily, so that the same
pictures get the same words. It knows nothing of sources, of files or of what makes a caption usable.
"""

from __future__ import annotations

import base64
import io
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from simplear.described import Described
from simplear.errors import MissingFileError, UserError
from simplear.hashing import sha256_of_all
from simplear.hub import is_hub_id

logger = logging.getLogger(__name__)

MODEL_FILES = ("*.json", "*.jinja", "*.safetensors", "*.txt")
"""Of a model's directory: what determines its answers."""
REFUSALS = frozenset({400, 413, 415, 422})
"""HTTP states that say something about the picture, not about the server."""
PASSING = frozenset({408, 409, 429})
"""HTTP states, beside those from 500, of a server that may answer later."""
JPEG_QUALITY = 95
"""Of pictures sent to a server."""
API_KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable whose content is sent as the bearer token."""


@dataclass(frozen=True)
class Answer:
    """What a captioner says of one picture."""

    text: str
    finished: bool = True
    """False: cut off at the limit of tokens."""
    refusal: str = ""
    """Why there is no text, if the captioner refused the picture."""


class Captioner(Described, ABC):
    """Pictures and a prompt to answers; its arguments are settings of the captions, kept in the manifest."""

    @abstractmethod
    def prepare(self, device: torch.device) -> None:
        """Load what `answer` needs; called once on each process, before any picture."""

    @abstractmethod
    def answer(self, images: Sequence[Image.Image], prompt: str, max_tokens: int) -> list[Answer]:
        """An answer for each picture, of at most `max_tokens` tokens."""


class TransformersCaptioner(Captioner):
    """A vision-language model that `AutoModelForImageTextToText` loads, such as Qwen2-VL or Qwen2.5-VL."""

    local_paths = frozenset({"model"})

    def __init__(self, model: str, *, revision: str | None = None, dtype: str = "auto") -> None:
        """
        Args:
            model: Directory or hub id, such as Qwen/Qwen2-VL-7B-Instruct.
            revision: Branch, tag or commit on the hub; the manifest keeps the commit that it means.
            dtype: Of the weights, such as "bfloat16"; "auto" keeps the file's.

        Raises:
            FileNotFoundError: a directory that holds no model.
            ValueError: a dtype that PyTorch does not have.
        """
        self.model_name, self.revision, self.dtype = model, revision, dtype
        if not is_hub_id(model) and not (Path(model) / "config.json").is_file():
            raise MissingFileError(
                f"no vision-language model at {model}: it has no config.json. Give a directory or a hub id."
            )
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UserError(f"dtype {dtype!r} is unknown: name bfloat16, float16, float32 or auto.")

    def describe(self) -> dict[str, Any]:
        """The revision is the commit on the hub, or a hash over the files."""
        directory = Path(self.model_name)
        if directory.is_dir():
            files = sorted({file for pattern in MODEL_FILES for file in directory.glob(pattern)})
            revision = sha256_of_all(files)
        else:
            from transformers import AutoConfig

            revision = AutoConfig.from_pretrained(self.model_name, revision=self.revision)._commit_hash
        return {**super().describe(), "revision": revision}

    def prepare(self, device: torch.device) -> None:
        """Load processor and weights."""
        from transformers import AutoModelForImageTextToText, AutoProcessor  # takes seconds, and a server needs neither

        self.processor: Any = AutoProcessor.from_pretrained(
            self.model_name, revision=self.revision, trust_remote_code=False
        )
        self.processor.tokenizer.padding_side = "left"  # the answer begins where the prompt ends
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            self.model_name, revision=self.revision, dtype=dtype, trust_remote_code=False
        )
        self.model = model.to(device).eval()
        # A model's own defaults of sampling would only be warned of: decoding is greedy.
        self.model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)

    @torch.inference_mode()
    def answer(self, images: Sequence[Image.Image], prompt: str, max_tokens: int) -> list[Answer]:
        """Greedy answers of one padded batch."""
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        text = self.processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        inputs = self.processor(
            text=[text] * len(images), images=[[image] for image in images], padding=True, return_tensors="pt"
        ).to(self.model.device, self.model.dtype)
        generated = self.model.generate(**inputs, max_new_tokens=max_tokens)[:, inputs["input_ids"].shape[1] :]
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        answers = []
        for ids in generated.tolist():
            length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
            words = self.processor.tokenizer.decode(ids[:length], skip_special_tokens=True)
            answers.append(Answer(words, finished=length < len(ids)))
        return answers


class ServerCaptioner(Captioner):
    """A server with OpenAI's chat protocol, such as vLLM's (``vllm serve Qwen/Qwen2-VL-7B-Instruct``).

    Pictures are sent as JPEG files by the client of the ``openai`` package, several at once. It tries again when there
    is no connection, a timeout or an overloaded server. A picture that the server refuses has no caption, with the
    reason; any other error stops the work. A server batches by load, so two runs may differ in single words.
    """

    not_described = frozenset({"url", "timeout", "tries", "concurrency"})

    def __init__(self, url: str, model: str, *, timeout: float = 120.0, tries: int = 5, concurrency: int = 8) -> None:
        """
        Args:
            url: Address up to the version, such as http://localhost:8000/v1.
            model: Name under which the server has the model.
            timeout: Seconds that an answer may take.
            tries: Of each request.
            concurrency: Requests sent at once, by each process.

        Raises ValueError for an invalid address and for numbers out of range.
        """
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{url} is not the address of a server, such as http://localhost:8000/v1.")
        if tries < 1 or concurrency < 1 or timeout <= 0:
            raise UserError("tries and concurrency are 1 or more, timeout is above 0.")
        self.url, self.model_name = url.rstrip("/"), model
        self.timeout, self.tries, self.concurrency = timeout, tries, concurrency

    @cached_property
    def _client(self) -> Any:
        try:
            import openai
        except ImportError as error:
            raise UserError("ServerCaptioner needs the package openai: pip install 'simplear[recaption]'.") from error
        key = os.environ.get(API_KEY_VARIABLE, "none")  # a server without keys ignores it
        return openai.OpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=self.tries - 1)

    def prepare(self, device: torch.device) -> None:
        """Check that the server answers and has the model. Raises ValueError if it has not."""
        client = self._client
        with self._errors():
            models = [model.id for model in client.models.list()]
        if self.model_name not in models:
            raise UserError(f"the server at {self.url} has no model {self.model_name!r}, but {models}.")

    def answer(self, images: Sequence[Image.Image], prompt: str, max_tokens: int) -> list[Answer]:
        """Answers in the order of the pictures."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda image: self._ask(image, prompt, max_tokens), images))

    def _ask(self, image: Image.Image, prompt: str, max_tokens: int) -> Answer:
        from openai import APIStatusError

        encoded = io.BytesIO()
        image.convert("RGB").save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        address = f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": prompt}]
        message = {"role": "user", "content": content}
        with self._errors():
            try:
                completion = self._client.chat.completions.create(
                    model=self.model_name, messages=[message], max_tokens=max_tokens, temperature=0, seed=0
                )
            except APIStatusError as error:
                if error.status_code not in REFUSALS:
                    raise
                logger.warning("%s refused a picture: %s", self.url, error)
                return Answer("", refusal=f"refused by the server ({error.status_code})")
            choice = completion.choices[0]
            text = choice.message.content or ""
            if not isinstance(text, str):
                raise TypeError("the content is not a text")
            return Answer(text, finished=choice.finish_reason != "length")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors of the client become messages that say what to do."""
        import openai

        try:
            yield
        except (openai.APIConnectionError, openai.APIStatusError) as error:
            state = getattr(error, "status_code", None)
            if state is not None and state not in PASSING and state < 500:
                raise UserError(
                    f"{self.url} answered: {error} Correct the address, the model or the key ({API_KEY_VARIABLE})."
                ) from error
            raise ConnectionError(
                f"{self.url} gave no answer in {self.tries} tries, the last time: {error} Units that are finished are "
                "kept: check the server and run the same again."
            ) from error
        except (ValueError, AttributeError, IndexError, TypeError) as error:
            raise UserError(f"{self.url} does not speak OpenAI's chat protocol ({error}).") from error
