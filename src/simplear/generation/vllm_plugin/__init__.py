"""The `vllm` engine: classifier-free guidance token by token on stock vLLM, through its plug-in points alone.

A guided image is two vLLM requests, conditional and unconditional, that must take every step together:

    client      VLLMEngine           two requests an image, alike but for prompt and role (`image_request`)
    scheduler   PairScheduler        holds a request back until its partner is there and both fit to the end (`pairs`)
    worker      GuidedSampling       guides and draws once a pair, and makes both rows take the same image id

vLLM itself is imported by `scheduler`, `logits_processor` and, when an engine is made, `engine`; the rest runs without.
docs/vllm.md tells what is refused and why.
"""
