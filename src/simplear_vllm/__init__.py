"""The `vllm` engine: classifier-free guidance token by token on stock vLLM, through its plug-in points alone.

A guided image is two vLLM requests, conditional and unconditional, that must take every step together:

    client      VLLMEngine           two requests an image, alike but for prompt and role (`request`)
    scheduler   PairScheduler        holds a request back until its partner is there and both fit to the end (`pairs`)
    worker      GuidedSampling       guides and draws once a pair, and makes both rows take the same image id

vLLM is imported by `scheduler`, `logits_processor` and, when an engine is made, `engine`; the other modules run without
it. README.md in this directory says how to set it up and which features of vLLM are refused.
"""
