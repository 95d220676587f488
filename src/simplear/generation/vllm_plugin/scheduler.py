"""vLLM's scheduler, with a gate in front: the rows of an image enter its queue together, when nothing can part them.

Everything else is the stock scheduler's. What it must not do to a pair (preempt a row, feed one row and not the other)
cannot happen to what `Pairs` admits, and is checked after every step all the same: a wrong image is never drawn.
A request that cannot be drawn ends as an error with its reason, and the engine goes on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from simplear.generation.vllm_plugin.image_request import ImageRequest
from simplear.generation.vllm_plugin.pairs import Capacity, Pairs, Refused
from simplear.generation.vllm_plugin.requirements import VLLMError, check_configuration, check_version

PARTNER_SECONDS = 60.0
"""How long a request waits for its partner before it is refused."""


class PairSplit(RuntimeError):
    """The rows of a pair were about to part: what would be drawn from here on is wrong, so nothing is."""


class PairScheduler(Scheduler):
    """The ``scheduler_cls`` of the `vllm` engine.

    Raises VLLMError for a version or a feature of vLLM that it was not made for.
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        check_version()
        check_configuration(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        self._pairs = Pairs(self._capacity())
        self._held: dict[str, Request] = {}
        self._notices: list[tuple[int, EngineCoreOutput]] = []

    def _capacity(self) -> Capacity:
        groups = self.kv_cache_config.kv_cache_groups
        if len(groups) != 1 or type(groups[0].kv_cache_spec) is not FullAttentionSpec:
            raise VLLMError("the vllm engine reserves KV blocks of full attention alone; this model has other layers.")
        manager = self.kv_cache_manager
        return Capacity(
            sequences=min(self.max_num_running_reqs, self.max_num_active_reqs),
            tokens=min(self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens),
            blocks=manager.block_pool.num_gpu_blocks - 1 - manager.watermark_blocks,  # one is vLLM's null block
            block_size=groups[0].kv_cache_spec.block_size,
            positions=self.max_model_len,
        )

    def add_request(self, request: Request) -> None:
        """Hold a request back until its image can run; one that never can ends as an error."""
        super().add_request(request)
        try:
            image = ImageRequest.of(request.sampling_params)
            self._pairs.arrive(request.request_id, image, request.num_prompt_tokens, time.monotonic())
        except Refused as refusal:
            self._give_up(refusal.request_ids, RequestStatus.FINISHED_ERROR, str(refusal))
        except ValueError as error:
            self._give_up([request.request_id], RequestStatus.FINISHED_ERROR, str(error))

    def _enqueue_waiting_request(self, request: Request) -> None:
        self._held[request.request_id] = request

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """The next forward pass, into which images enter whole."""
        late = self._pairs.overdue(since=time.monotonic() - PARTNER_SECONDS)
        reason = f"the other request of the pair did not come in {PARTNER_SECONDS:.0f} s."
        self._give_up(late, RequestStatus.FINISHED_ERROR, reason)
        if self._pause_state == PauseState.UNPAUSED:
            for request_id in self._pairs.admit():
                super()._enqueue_waiting_request(self._held.pop(request_id))
        output = super().schedule(throttle_prefills)
        if self._pause_state != PauseState.PAUSED_ALL:
            self._require_whole_pairs(output)
        return output

    def _require_whole_pairs(self, output: SchedulerOutput) -> None:
        for pair in self._pairs.running():
            rows = [self.requests[request_id] for request_id in pair]
            drawn = {row.num_output_tokens for row in rows}
            fed = [row.request_id in output.num_scheduled_tokens and not row.is_prefill_chunk for row in rows]
            if len(rows) != 2 or len(drawn) != 1 or not all(fed):
                raise PairSplit(
                    f"of the pair {pair} the rows with {sorted(drawn)} codes are fed whole: {fed}. This is a mistake "
                    "in the plug-in or a vLLM that it does not know; please report it."
                )

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        raise PairSplit(f"request {request.request_id} was about to be preempted, though its KV blocks are reserved.")

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """As vLLM's, but images that are being drawn are never interrupted for it.

        Raises VLLMError where that is asked for.
        """
        if reset_running_requests and self.running:
            raise VLLMError(f"{len(self.running)} requests are being drawn and cannot begin again: wait or abort them.")
        return super().reset_prefix_cache(False, reset_connector)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """As vLLM's, and the partners of these requests too, whose clients are told so."""
        if request_ids is None:
            return super().finish_requests(None, finished_status)
        asked = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        partners = {partner for asked_for in asked for partner in self._pairs.companions(asked_for)} - asked
        finished = super().finish_requests(asked, finished_status)
        self._give_up(partners, finished_status, "the other request of its pair was given up.")
        return finished

    def _give_up(self, request_ids: Iterable[str], status: RequestStatus, reason: str) -> None:
        """End requests that their clients still wait for; the reason is the output's ``stop_reason``."""
        for request in super().finish_requests(list(request_ids), status):
            notice = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                stop_reason=reason,
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            self._notices.append((request.client_index, notice))

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        self._pairs.leave(request.request_id)
        self._held.pop(request.request_id, None)
        return super()._free_request(request, delay_free_blocks)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """What the clients get from this step, requests that were given up among it."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client, notice in self._notices:
            outputs.setdefault(client, EngineCoreOutputs()).outputs.append(notice)
        self._notices = []
        return outputs

    def get_request_counts(self) -> tuple[int, int]:
        """Requests that run and that wait, those held back among the latter."""
        running, waiting = super().get_request_counts()
        return running, waiting + len(self._held)

    def has_requests(self) -> bool:
        """Whether a step is needed, be it only to tell clients what was given up."""
        return bool(self._notices) or super().has_requests()
