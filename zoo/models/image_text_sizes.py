"""Sizes of the models from images and text to text: a family and the fields of its configuration each, nested as there.

The tiny ones have all parts of their family and a vocabulary of 256; the real ones have the published sizes, and build
under `torch.device("meta")`.
"""

from __future__ import annotations

from typing import Any

_TEXT = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
# Families of Qwen's kind call layers and heads otherwise, and read patches that are cut out already.
_PATCHES = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "patch_size": 4}
_SEEN = {"image_token_id": 250, "video_token_id": 251}
_AROUND = {
    "image_start_token_id": 252,
    "image_end_token_id": 253,
    "video_start_token_id": 254,
    "video_end_token_id": 255,
}
_CLIP = {**_VISION, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 4}
_CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def _rope(sections: list[int], theta: float = 1e4, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": sections, **more}


# name: (family, configuration)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_vl_moe_tiny": (
        "qwen3_vl_moe",
        {
            **_SEEN,
            "vision_start_token_id": 252,
            "vision_end_token_id": 253,
            "text_config": {
                **_TEXT,
                "head_dim": 16,
                "moe_intermediate_size": 32,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "tie_word_embeddings": False,
                "rope_parameters": _rope([4, 2, 2]),
            },
            "vision_config": {
                **_PATCHES,
                "out_hidden_size": 64,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        },
    ),
    "qwen3_5_moe_tiny": (
        "qwen3_5_moe",
        {
            **_SEEN,
            "vision_start_token_id": 252,
            "vision_end_token_id": 253,
            "text_config": {
                **_TEXT,
                "head_dim": 16,
                "layer_types": ["linear_attention", "full_attention"],
                "linear_num_value_heads": 4,
                "linear_num_key_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 32,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "rope_parameters": _rope([4, 2, 2]),
            },
            "vision_config": {**_PATCHES, "out_hidden_size": 64, "num_position_embeddings": 16},
        },
    ),
    "glm4v_moe_tiny": (
        "glm4v_moe",
        {
            **_SEEN,
            **_AROUND,
            "text_config": {
                **_TEXT,
                "intermediate_size": 96,
                "moe_intermediate_size": 32,
                "n_routed_experts": 8,
                "num_experts_per_tok": 2,
                "rope_parameters": _rope([2, 1, 1], partial_rotary_factor=0.5),
            },
            "vision_config": {**_PATCHES, "out_hidden_size": 64, "image_size": 16},
        },
    ),
    "aria_tiny": (
        "aria",
        {
            "image_token_index": 250,
            "projector_patch_to_query_dict": {16: 4},
            "text_config": {
                **_TEXT,
                "model_type": "aria_text",
                "intermediate_size": 32,
                "moe_num_experts": 8,
                "moe_topk": 2,
            },
            "vision_config": {**_VISION, "model_type": "idefics3_vision", "image_size": 16, "patch_size": 4},
        },
    ),
    "llama4_tiny": (
        "llama4",
        {
            "image_token_index": 250,
            "boi_token_index": 251,
            "eoi_token_index": 252,
            "text_config": {
                **_TEXT,
                "head_dim": 16,
                "intermediate_size": 32,
                "intermediate_size_mlp": 64,
                "num_local_experts": 8,
                "attention_chunk_size": 64,
            },
            "vision_config": {
                **_VISION,
                "intermediate_size": 128,
                "image_size": 16,
                "patch_size": 4,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
        },
    ),
    "ernie4_5_vl_tiny": (
        "ernie4_5_vl_moe",
        {
            **_SEEN,
            **_AROUND,
            "text_config": {
                **_TEXT,
                "intermediate_size": 96,
                "moe_intermediate_size": [32, 16],
                "moe_num_experts": 8,
                "moe_k": 2,
                "rope_parameters": _rope([3, 3, 2]),
            },
            "vision_config": {**_PATCHES, "hidden_size": 64},
        },
    ),
    "deepseek_ocr2_tiny": (
        "deepseek_ocr2",
        {
            "image_token_id": 250,
            "text_config": {
                **_TEXT,
                "num_key_value_heads": 4,
                "intermediate_size": 96,
                "moe_intermediate_size": 32,
                "n_routed_experts": 8,
                "n_shared_experts": 1,
                "num_experts_per_tok": 2,
                "mlp_layer_types": ["dense", "sparse"],
            },
            "vision_config": {
                "sam_config": {
                    "hidden_size": 32,
                    "output_channels": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 192,
                    "patch_size": 4,
                    "window_size": 4,
                    "global_attn_indexes": [],
                    "downsample_channels": [24, 32],
                },
                "encoder_config": {**_VISION, "vocab_size": 8, "num_hidden_layers": 1, "num_key_value_heads": 2},
            },
        },
    ),
    "unlimited_ocr_tiny": (
        "unlimited_ocr",
        {
            "image_token_id": 250,
            "text_config": {
                **_TEXT,
                "num_key_value_heads": 4,
                "intermediate_size": 96,
                "moe_intermediate_size": 32,
                "n_routed_experts": 8,
                "n_shared_experts": 1,
                "num_experts_per_tok": 2,
                "mlp_layer_types": ["dense", "sparse"],
                "sliding_window": 64,
            },
            "vision_config": {
                "sam_config": {
                    "hidden_size": 32,
                    "output_channels": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 64,
                    "patch_size": 4,
                    "window_size": 4,
                    "global_attn_indexes": [],
                    "mlp_dim": 48,
                    "downsample_channels": [24, 32],
                },
                "encoder_config": {**_VISION, "num_hidden_layers": 1, "image_size": 56, "patch_size": 14},
            },
        },
    ),
    "kimi_k25_tiny": (
        "kimi_k25",
        {
            **_SEEN,
            "vision_start_token_id": 252,
            "vision_end_token_id": 253,
            "projection_hidden_size": 32,
            "tie_word_embeddings": False,
            "text_config": {
                **_TEXT,
                "model_type": "deepseek_v3",
                "num_key_value_heads": 4,
                "intermediate_size": 96,
                "first_k_dense_replace": 1,
                "moe_intermediate_size": 32,
                "n_routed_experts": 8,
                "n_shared_experts": 1,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "q_lora_rank": 32,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 12,
                "qk_rope_head_dim": 4,
                "v_head_dim": 16,
            },
            "vision_config": {**_VISION, "patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4},
        },
    ),
    "llava_mixtral_tiny": (
        "llava",
        {
            "image_token_index": 250,
            "image_seq_length": 16,
            "text_config": {**_TEXT, "model_type": "mixtral", "intermediate_size": 32, "num_local_experts": 4},
            "vision_config": _CLIP,
        },
    ),
    "internvl_qwen3_moe_tiny": (
        "internvl",
        {
            "image_token_id": 250,
            "image_seq_length": 4,
            "text_config": {
                **_TEXT,
                "model_type": "qwen3_moe",
                "head_dim": 16,
                "moe_intermediate_size": 32,
                "num_experts": 8,
                "num_experts_per_tok": 2,
            },
            "vision_config": {**_VISION, "image_size": [16, 16], "patch_size": [4, 4]},
        },
    ),
    "gemma4_tiny": (
        "gemma4",
        {
            "image_token_id": 250,
            "boi_token_id": 252,
            "eoi_token_id": 253,
            "audio_token_id": 249,
            "boa_token_id": 248,
            "text_config": {
                **_TEXT,
                "pad_token_id": 0,
                "head_dim": 16,
                "global_head_dim": 16,
                "intermediate_size": 96,
                "layer_types": ["sliding_attention", "full_attention"],
                "vocab_size_per_layer_input": 256,
                "hidden_size_per_layer_input": 8,
                "enable_moe_block": True,
                "num_experts": 8,
                "top_k_experts": 2,
                "moe_intermediate_size": 32,
            },
            "vision_config": {
                **_VISION,
                "head_dim": 16,
                "num_key_value_heads": 2,
                "patch_size": 4,
                "position_embedding_size": 64,
            },
            "audio_config": None,
        },
    ),
    "moe_llava_tiny": (
        "moe_llava",
        {
            "image_token_index": 250,
            "image_seq_length": 16,
            "text_config": {**_TEXT, "model_type": "phi", "num_hidden_layers": 4, "intermediate_size": 96},
            "vision_config": _CLIP,
        },
    ),
    # Table 2 of MoE-LLaVA (2401.15947), each with four experts in every other layer, two a token.
    "moe_llava_stablelm_1.6b_4e": (
        "moe_llava",
        {
            "image_token_index": 100351,
            "text_config": {
                "model_type": "stablelm",
                "vocab_size": 100352,
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "num_hidden_layers": 24,
                "use_qkv_bias": True,
            },
            "vision_config": _CLIP_L_336,
        },
    ),
    "moe_llava_qwen_1.8b_4e": (
        "moe_llava",
        {
            "image_token_index": 151935,
            "text_config": {
                "model_type": "qwen2",
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 5504,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
            },
            "vision_config": _CLIP_L_336,
        },
    ),
    "moe_llava_phi2_2.7b_4e": (
        "moe_llava",
        {
            "image_token_index": 51199,
            "text_config": {
                "model_type": "phi",
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 32,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4},
            },
            "vision_config": _CLIP_L_336,
        },
    ),
    "qwen3_vl_30b_a3b": (
        "qwen3_vl_moe",
        {
            "text_config": {
                "num_hidden_layers": 48,
                "intermediate_size": 6144,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "moe_intermediate_size": 768,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "max_position_embeddings": 262144,
                "tie_word_embeddings": False,
                "rope_parameters": _rope([24, 20, 20], 5e6, mrope_interleaved=True),
            },
            "vision_config": {"out_hidden_size": 2048},
        },
    ),
    "qwen3_vl_235b_a22b": (
        "qwen3_vl_moe",
        {
            "text_config": {
                "hidden_size": 4096,
                "num_hidden_layers": 94,
                "intermediate_size": 12288,
                "num_attention_heads": 64,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "moe_intermediate_size": 1536,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "max_position_embeddings": 262144,
                "tie_word_embeddings": False,
                "rope_parameters": _rope([24, 20, 20], 5e6, mrope_interleaved=True),
            },
            "vision_config": {"out_hidden_size": 4096},
        },
    ),
    "glm_4.5v": (
        "glm4v_moe",
        {
            "text_config": {"head_dim": 128, "rope_parameters": _rope([8, 12, 12], partial_rotary_factor=0.5)},
            "vision_config": {"hidden_size": 1536, "intermediate_size": 10944},
        },
    ),
    "aria": (
        "aria",
        {
            "text_config": {
                "model_type": "aria_text",
                "vocab_size": 100352,
                "hidden_size": 2560,
                "num_hidden_layers": 28,
                "num_attention_heads": 20,
                "num_key_value_heads": 20,
                "intermediate_size": 1664,
                "max_position_embeddings": 65536,
                "moe_num_experts": 64,
                "moe_topk": 6,
                "moe_num_shared_experts": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
            },
            "vision_config": {
                "model_type": "idefics3_vision",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 980,
                "patch_size": 14,
            },
        },
    ),
    "llama4_scout": (
        "llama4",
        {
            "text_config": {
                "max_position_embeddings": 10485760,
            },
            "vision_config": {"hidden_size": 1408},
        },
    ),
    "llama4_maverick": (
        "llama4",
        {
            "text_config": {
                "num_local_experts": 128,
                "interleave_moe_layer_step": 2,
                "use_qk_norm": False,
                "max_position_embeddings": 1048576,
            },
            "vision_config": {"hidden_size": 1408},
        },
    ),
    "ernie4_5_vl_28b_a3b": (
        "ernie4_5_vl_moe",
        {"text_config": {"rope_parameters": _rope([22, 22, 20], 5e5)}},
    ),
}
