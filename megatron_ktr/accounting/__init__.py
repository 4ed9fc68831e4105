"""FLOPs, memory and time of a training step on paper: plain arithmetic, no torch, for any model size and layout.

``work`` says what a step has to compute, ``flops`` counts its arithmetic, ``layout`` and ``pipeline`` place it on
ranks, ``saved`` and ``memory`` say what a rank holds (``rollout_memory``: while an engine generates there), ``timing``
how long a step takes, ``planner`` which layouts fit and which are best; ``rates`` turns a real step's seconds into
metrics.
"""
