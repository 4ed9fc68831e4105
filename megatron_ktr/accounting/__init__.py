"""Estimates FLOPs, memory and time of a training step by plain arithmetic, without torch, for any model and layout.

``work`` describes what a step has to compute, and ``flops`` counts its operations. ``layout`` and ``pipeline`` place
the work on ranks. ``saved`` and ``memory`` estimate the memory of a rank while it trains, ``rollout_memory`` while a
rollout engine generates on it. ``timing`` estimates the time of a step, and ``planner`` finds the layouts that fit and
the best of them. ``rates`` turns the measured seconds of a real step into metrics.
"""
