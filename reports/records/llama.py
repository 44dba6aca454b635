"""Settings of llama.cpp that reports and runs name."""

from __future__ import annotations

from typing import Literal

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl"]
FlashAttention = Literal["auto", "on", "off"]
RopeScaling = Literal["unspecified", "none", "linear", "yarn", "longrope"]
SplitMode = Literal["none", "layer", "row", "tensor"]
Pooling = Literal["model", "none", "mean", "cls", "last"]
