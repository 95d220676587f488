"""vLLM's scheduler, with a gate in front: the rows of an image enter its queue together, when nothing can part them.

Everything else is the stock scheduler's. A request that cannot be drawn ends as an error with its reason, and the
engine goes on. A pair that is split all the same is noticed in `logits_processor`.
"""

from __future__ import annotations

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

from simplear_vllm.pairs import Capacity, Pairs, Refused
from simplear_vllm.request import ImageRequest
from simplear_vllm.requirements import VLLMError, check_configuration


class PairScheduler(Scheduler):
    """The ``scheduler_cls`` of the `vllm` engine.

    Raises VLLMError for a version of vLLM that it was not made for, and for features that split pairs.
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
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
            self._pairs.arrive(request.request_id, image, request.num_prompt_tokens)
        except Refused as refused:
            self._give_up(refused.request_ids, RequestStatus.FINISHED_ERROR, str(refused))

    def _enqueue_waiting_request(self, request: Request) -> None:
        self._held[request.request_id] = request

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """The next forward pass, into which images enter whole."""
        if self._pause_state == PauseState.UNPAUSED:
            for request_id in self._pairs.admit():
                super()._enqueue_waiting_request(self._held.pop(request_id))
        return super().schedule(throttle_prefills)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """As vLLM's, and the partners of these requests too, whose clients are told so."""
        if request_ids is None:
            return super().finish_requests(None, finished_status)
        ending = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        partners = {partner for request_id in ending for partner in self._pairs.companions(request_id)} - ending
        finished = super().finish_requests(ending, finished_status)
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
            )
            self._notices.append((request.client_index, notice))

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        self._pairs.leave(request.request_id)
        self._held.pop(request.request_id, None)
        return super()._free_request(request, delay_free_blocks)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """What the clients get from this step, including requests that were given up."""
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
