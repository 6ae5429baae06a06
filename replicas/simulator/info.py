"""What the server says about how it was started."""

from __future__ import annotations

from .config import VERSION, SimConfig
from .engine import CHUNK, Engine
from .shapes import Json

# What 0.5.23 says of a model that makes text.
_NO_EMBEDDER: Json = {
    **dict.fromkeys(("family", "task", "execution", "attention"), "none"),
    "pooling": "model_defined",
    "normalize": False,
    "postprocessor": "none",
    "tokenizer_special_tokens": "model_default",
    "supports_dimensions": False,
    "supports_token_embeddings": False,
    "supports_multimodal": False,
    "requires_embedding_flag": False,
    "auto_enable_embedding": False,
    "bcg_eligibility": "disabled",
    "safe_disable_kv_cache": False,
    "safe_disable_radix_cache": False,
    "safe_disable_chunked_prefill": False,
    "enabled": False,
    "matryoshka_dimensions": [],
}
_NO_BCG: Json = {
    "prefill_backend": "disabled",
    "enabled": False,
    "capture_token_budget": 4096,
    "capture_batch_sizes": [4, 8, 16, 32],
}
_CACHE: Json = {
    "kv_cache_disabled": False,
    "radix_cache_disabled": False,
    "chunked_prefill_disabled": False,
}


def server_info(config: SimConfig, engine: Engine, status: str) -> Json:
    """/server_info: the arguments of the server, the api key among them as SGLang does, and a little of
    its state.
    """
    return {
        "model_path": config.model_path,
        "tokenizer_path": config.model_path,
        "tokenizer_mode": "auto",
        "load_format": "auto",
        "context_length": config.context_length,
        "max_running_requests": config.max_running,
        "max_queued_requests": config.max_queued,
        "max_total_tokens": config.kv_tokens,
        "chunked_prefill_size": CHUNK,
        "schedule_policy": "fcfs",
        "tp_size": 1,
        "dp_size": 1,
        "random_seed": config.seed,
        "host": config.host,
        "port": config.port,
        "api_key": config.api_key,
        "admin_api_key": None,
        "served_model_name": config.name,
        "weight_version": "default",
        "reasoning_parser": config.reasoning_parser,
        "tool_call_parser": None,
        "stream_interval": config.stream_interval,
        "enable_metrics": config.enable_metrics,
        "decode_log_interval": config.decode_log_interval,
        "load_snapshot_publish_interval": config.publish_interval,
        "status": status,
        "internal_states": [
            {
                "effective_max_running_requests_per_dp": config.max_running,
                "memory_usage": {"token_capacity": engine.kv_tokens},
            }
        ],
        "version": VERSION,
        "frontend": "python",
    }


def model_info(config: SimConfig) -> Json:
    """/model_info."""
    return {
        "model_path": config.model_path,
        "served_model_name": config.name,
        "tokenizer_path": config.model_path,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "load_format": "auto",
        "reasoning_parser": config.reasoning_parser,
        "tool_call_parser": None,
        "disaggregation_mode": "null",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "embedding": {**_NO_EMBEDDER, "bcg": dict(_NO_BCG), "cache": dict(_CACHE)},
    }
