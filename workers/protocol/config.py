"""How a cell is configured, and what it says of its model and context."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from crumplezone.reports.records.llama import CacheType, FlashAttention, RopeScaling, SplitMode

# enum ggml_type (ggml.h): of BF16, llama-cpp-python has no constant
CACHE_TYPES: dict[CacheType, int] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}
QUANTIZED = CACHE_TYPES.keys() - {"f32", "f16", "bf16"}
FLASH_ATTENTION: dict[FlashAttention, int] = {"auto": -1, "off": 0, "on": 1}  # enum llama_flash_attn_type

ROPE_SCALING: dict[RopeScaling, int] = {  # enum llama_rope_scaling_type
    "unspecified": -1,
    "none": 0,
    "linear": 1,
    "yarn": 2,
    "longrope": 3,
}
SPLIT_MODES: dict[SplitMode, int] = {"none": 0, "layer": 1, "row": 2, "tensor": 3}  # enum llama_split_mode
LOAD_MODES = {(False, False): 0, (True, False): 1, (False, True): 2, (True, True): 3}
"""By ``use_mmap`` and ``use_mlock``: enum llama_load_mode."""
DEVICES_MAX = 16  # llama_max_devices

INT32_MAX = 2**31 - 1
CTX_PAD = 256  # llama.cpp rounds the context of a sequence up to this (llama_context, GGML_PAD)

SIZE_MAX = 2**24
Size = Annotated[int, msgspec.Meta(ge=0, le=SIZE_MAX)]
Token = Annotated[int, msgspec.Meta(ge=0, le=INT32_MAX)]
Position = Annotated[int, msgspec.Meta(ge=-1, le=INT32_MAX)]


class CellConfig(msgspec.Struct, frozen=True):
    """Model and context parameters; names and meanings are those of ``llama_context_params``.

    The defaults are llama.cpp's own: what a report does not name was that. A caller who says nothing gets
    those of `configure`.
    """

    model: str
    n_ctx: int  # per cell: n_ctx_seq * n_seq_max
    n_batch: int
    n_ubatch: int
    n_seq_max: int
    n_threads: int
    n_gpu_layers: int = 0
    kv_unified: bool = False  # True: one stream of keys and values, through which sequences affect rounding
    type_k: CacheType = "f16"
    type_v: CacheType = "f16"
    flash_attn: FlashAttention = "auto"
    n_threads_batch: int = 0  # of native calls of more than one token; 0: n_threads
    rope_scaling_type: RopeScaling = "unspecified"
    rope_freq_base: float = 0.0  # 0, in this and the next: the model's
    rope_freq_scale: float = 0.0
    yarn_ext_factor: float = -1.0  # below 0, in these: the model's
    yarn_attn_factor: float = -1.0
    yarn_beta_fast: float = -1.0
    yarn_beta_slow: float = -1.0
    yarn_orig_ctx: int = 0
    offload_kqv: bool = True
    op_offload: bool = True
    swa_full: bool = True
    use_mmap: bool = True
    use_mlock: bool = False
    split_mode: SplitMode = "layer"
    main_gpu: int = 0
    tensor_split: tuple[float, ...] = ()

    def file(self) -> ModelFile:
        """What of it the model depends on."""
        return ModelFile(**{name: getattr(self, name) for name in ModelFile.__struct_fields__})

    def context(self) -> CellConfig:
        """As reports have it."""
        return self

    def parameters(self) -> dict[str, Any]:
        """All but the model, by name, as reports have them; of how a model is split, only if it is."""
        values = msgspec.structs.asdict(self)
        return {name: value for name, value in values.items() if name != "model" and value != ()}


class ModelFile(msgspec.Struct, frozen=True):
    """What a zygote loads: of any cell's configuration, the fields that a model depends on."""

    model: str
    n_gpu_layers: int = 0
    use_mmap: bool = True
    use_mlock: bool = False
    split_mode: SplitMode = "layer"
    main_gpu: int = 0
    tensor_split: tuple[float, ...] = ()


class CellInfo(msgspec.Struct, frozen=True):
    """What the loaded model and context are."""

    n_vocab: Size
    n_embd: Size
    n_ctx_seq: Size
    n_ctx_train: Size
    n_batch: Size
    has_encoder: bool
    has_decoder: bool
    n_embd_inp: Size
    causal: bool  # attention; BERT-like models see the whole batch in one pass
    recurrent: bool  # a state in the place of positions
    learned_positions: bool  # no more than n_ctx_train of them
    n_pos_per_embd: Annotated[int, msgspec.Meta(ge=1, le=4)]
    description: str
    system_info: str
    llama_cpp: str
