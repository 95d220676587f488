"""vLLM's scheduler, with a gate in front: the rows of an image enter its queue together, when nothing can part them.

Everything else is the stock scheduler's. A request that cannot be drawn ends as an error with its reason, and the
engine goes on. A pair that is split all the same is noticed in `logits_processor`.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from simplear_vllm.pairs import Capacity, Pairs
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
        """Hold a request back until its image can run; an image that never can ends as an error with the reason."""
        super().add_request(request)
        image = ImageRequest.of(request.sampling_params)
        refusal = self._pairs.arrive(request.request_id, image, request.num_prompt_tokens)
        if refusal is not None:
            self._refuse(request.request_id, refusal)

    def _enqueue_waiting_request(self, request: Request) -> None:
        self._held[request.request_id] = request

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """The next forward pass, into which images enter whole."""
        if self._pause_state == PauseState.UNPAUSED:
            for request_id in self._pairs.admit():
                super()._enqueue_waiting_request(self._held.pop(request_id))
        return super().schedule(throttle_prefills)

    def _refuse(self, request_id: str, reason: str) -> None:
        """End a request, whose client gets the reason as the output's ``stop_reason``."""
        for request in self.finish_requests([request_id], RequestStatus.FINISHED_ERROR):
            finish_reason = request.get_finished_reason()
            notice = EngineCoreOutput(request_id, new_token_ids=[], finish_reason=finish_reason, stop_reason=reason)
            self._notices.append((request.client_index, notice))

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        self._pairs.leave(request.request_id)
        self._held.pop(request.request_id, None)
        return super()._free_request(request, delay_free_blocks)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """What the clients get from this step, including refusals."""
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
        """Whether a step is needed, be it only to tell clients what was refused."""
        return bool(self._notices) or super().has_requests()
