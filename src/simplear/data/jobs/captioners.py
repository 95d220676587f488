"""What describes a picture in words: a vision-language model through transformers, or a server of one.

A captioner takes pictures and one prompt and gives an answer for each picture, decoded greedily, so that the same
pictures get the same words. It knows nothing of sources, of files or of what makes a caption usable.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
"""Of a model's directory: what decides its answers."""
WORTH_A_RETRY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP states of a server that may answer later."""
REFUSALS = frozenset({400, 413, 415, 422})
"""HTTP states that say something about the picture, not about the server."""
REDIRECTS = frozenset({301, 302, 303, 307, 308})
"""HTTP states that name another address."""
JPEG_QUALITY = 95
"""Of pictures on the way to a server."""
API_KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable whose content is sent as the bearer token, where it is set."""


@dataclass(frozen=True)
class Answer:
    """What a captioner says of one picture."""

    text: str
    finished: bool = True
    """False: cut off at the limit of tokens."""
    refusal: str = ""
    """Why there is no text, if the captioner would not take the picture."""


class Captioner(Described, ABC):
    """Pictures and a prompt to answers; its arguments are settings of the captions, kept in the manifest."""

    retries: Counter[str]
    """Times that something was tried again, by reason."""

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
        self.retries = Counter()
        if not is_hub_id(model) and not (Path(model) / "config.json").is_file():
            raise MissingFileError(
                f"no vision-language model at {model}: it has no config.json. Give a directory or a hub id."
            )
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UserError(f"dtype {dtype!r} is none of PyTorch's: bfloat16, float16, float32 or auto.")

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

    Pictures are sent as JPEG files, and requests of a batch run side by side. What may pass (no connection, a timeout,
    an overloaded server) is tried again and counted; a picture that the server refuses has no caption, with the reason;
    anything else stops the work. A server batches by load, so two runs may differ in single words.
    """

    not_described = frozenset({"url", "timeout", "tries", "wait", "concurrency"})

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float = 120.0,
        tries: int = 5,
        wait: float = 1.0,
        concurrency: int = 8,
    ) -> None:
        """
        Args:
            url: Address up to the version, such as http://localhost:8000/v1.
            model: Name under which the server has the model.
            timeout: Seconds that an answer may take.
            tries: Of each request.
            wait: Seconds before the second try; doubled before each later one.
            concurrency: Requests under way at once, of each process.

        Raises ValueError for an invalid address and for numbers out of range.
        """
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{url} is not the address of a server, such as http://localhost:8000/v1.")
        if tries < 1 or concurrency < 1 or timeout <= 0 or wait < 0:
            raise UserError("tries and concurrency are 1 or more, timeout is above 0, wait 0 or more.")
        self.url, self.model_name = url.rstrip("/"), model
        self.timeout, self.tries, self.wait, self.concurrency = timeout, tries, wait, concurrency
        self.retries = Counter()
        self._counting = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirects())
        self._images: Sequence[Image.Image] = ()
        self._addresses: list[str] = []

    def prepare(self, device: torch.device) -> None:
        """Make sure that the server answers and has the model. Raises ValueError when it has not."""
        listed = [entry.get("id") for entry in self._request("/models", None).get("data", [])]
        if self.model_name not in listed:
            raise UserError(f"the server at {self.url} has no model {self.model_name!r}, but {listed}.")

    def answer(self, images: Sequence[Image.Image], prompt: str, max_tokens: int) -> list[Answer]:
        """Answers in the order of the pictures."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            if images is not self._images:  # the same pictures are asked about more than once
                self._images, self._addresses = images, list(pool.map(_data_address, images))
            return list(pool.map(lambda address: self._ask(address, prompt, max_tokens), self._addresses))

    def _ask(self, address: str, prompt: str, max_tokens: int) -> Answer:
        content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": prompt}]
        body = {
            "model": self.model_name,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "seed": 0,
        }
        try:
            choice = self._request("/chat/completions", body)["choices"][0]
            text = choice["message"]["content"] or ""
            if not isinstance(text, str):
                raise TypeError
            return Answer(text, finished=choice["finish_reason"] != "length")
        except _RefusedError as refused:
            return Answer("", refusal=f"refused by the server ({refused})")
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"{self.url}/chat/completions answered without a text in choices[0].message.content: it does not speak "
                "OpenAI's chat protocol."
            ) from error

    def _request(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The JSON of an answer, however often it takes to get it."""
        request = urllib.request.Request(self.url + path, headers={"Content-Type": "application/json"})
        if body is not None:
            request.data = json.dumps(body).encode()
        if key := os.environ.get(API_KEY_VARIABLE):
            request.add_header("Authorization", f"Bearer {key}")
        reason = ""
        for attempt in range(self.tries):
            if attempt:
                with self._counting:
                    self.retries[reason] += 1
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                said = error.read(500).decode(errors="replace")
                if error.code in REFUSALS and body is not None:
                    logger.warning("%s refused a picture (%d): %s", self.url, error.code, said)
                    raise _RefusedError(error.code) from error
                if error.code in REDIRECTS:
                    raise UserError(
                        f"{self.url}{path} answered {error.code}, a redirect to {error.headers.get('Location')}, which "
                        "is not followed since it could take the key elsewhere: give the server's own address."
                    ) from error
                if error.code not in WORTH_A_RETRY:
                    raise UserError(
                        f"{self.url}{path} answered {error.code} {error.reason}: {said} Mend address, model or key "
                        f"({API_KEY_VARIABLE})."
                    ) from error
                reason = f"HTTP {error.code}"
            except TimeoutError:
                reason = "timeout"
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                inner = getattr(error, "reason", error)
                reason = "timeout" if isinstance(inner, TimeoutError) else "no connection"
            except ValueError:
                reason = "an answer that is not JSON"
        raise ConnectionError(
            f"{self.url}{path} gave no answer in {self.tries} tries, the last time: {reason}. Units that are finished "
            "are kept: see to the server and run the same again."
        )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes redirects errors: Python would send the key along, to whatever host they name."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _data_address(image: Image.Image) -> str:
    encoded = io.BytesIO()
    image.convert("RGB").save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()


class _RefusedError(Exception):
    """The server does not take this picture; its text is the HTTP state."""
