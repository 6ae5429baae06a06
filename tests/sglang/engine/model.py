"""`python model.py FOLDER`: a Llama of 2 layers whose greedy answer to everything is one sentence.

Random weights where they do not matter, and made by hand where they do: attention and MLP run and add
nothing (their output projections are zero), the embedding is one-hot, and the head is a table of which token
follows which. Its last word is followed by the end token. Nothing is downloaded. Needs numpy, tokenizers and
safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

# Every word once: what follows depends on the last token alone.
SENTENCE = (
    "A tiny model with random weights wrote this text: one word follows another until every token it knows "
    "has been said, then comes the end."
)
VOCABULARY = 512  # also the width of the model: one-hot embeddings
CONTEXT = 2048
HEADS, KV_HEADS, HEAD_SIZE, MLP, LAYERS = 8, 2, 64, 256, 2
END = "<|end|>"
MARKS = ("<|bos|>", END, "<|pad|>", "<|turn|>", "<|says|>")
TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}<|says|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant<|says|>{% endif %}"
)


def tokenizer() -> Tokenizer:
    """Byte-level BPE: any text is encoded, and each word of the sentence is one token or a few."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(MARKS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    made.train_from_iterator([SENTENCE], trainer)
    missing = VOCABULARY - made.get_vocab_size()
    made.add_special_tokens([AddedToken(f"<|reserved_{n}|>", special=True) for n in range(missing)])
    return made


def walk(tokens: Tokenizer) -> Any:
    """The next token of each: along the sentence, to the end mark; from anywhere else to its beginning."""
    sentence = list(dict.fromkeys(tokens.encode(SENTENCE).ids))
    following = np.full(VOCABULARY, sentence[0])
    following[sentence] = [*sentence[1:], tokens.token_to_id(END)]
    return following


def weights(following: Any) -> dict[str, Any]:
    """All tensors, by Hugging Face's names."""
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> Any:
        return (rng.standard_normal(shape) * 0.02).astype(np.float32)

    width = VOCABULARY
    head = np.zeros((VOCABULARY, width), dtype=np.float32)
    head[following, np.arange(VOCABULARY)] = 1.0
    ones = np.ones(width, dtype=np.float32)
    tensors = {
        "model.embed_tokens.weight": np.eye(VOCABULARY, width, dtype=np.float32),
        "lm_head.weight": head,
        "model.norm.weight": ones,
    }
    for layer in range(LAYERS):
        tensors |= {
            f"model.layers.{layer}.{name}.weight": tensor
            for name, tensor in (
                ("self_attn.q_proj", noise(HEADS * HEAD_SIZE, width)),
                ("self_attn.k_proj", noise(KV_HEADS * HEAD_SIZE, width)),
                ("self_attn.v_proj", noise(KV_HEADS * HEAD_SIZE, width)),
                ("self_attn.o_proj", np.zeros((width, HEADS * HEAD_SIZE), dtype=np.float32)),
                ("mlp.gate_proj", noise(MLP, width)),
                ("mlp.up_proj", noise(MLP, width)),
                ("mlp.down_proj", np.zeros((width, MLP), dtype=np.float32)),
                ("input_layernorm", ones),
                ("post_attention_layernorm", ones),
            )
        }
    return tensors


def write(folder: Path) -> None:
    """The whole model, as `--model-path` wants it (about 10 MB)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = tokenizer()
    tokens.save(str(folder / "tokenizer.json"))
    marks = {"bos": MARKS[0], "eos": END, "pad": MARKS[2]}
    numbers = {f"{name}_token_id": tokens.token_to_id(mark) for name, mark in marks.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": VOCABULARY,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **numbers,
    }
    described = {
        "config.json": config,
        "generation_config.json": {"do_sample": False, **numbers},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": MARKS[0],
            "eos_token": END,
            "pad_token": MARKS[2],
            "chat_template": TEMPLATE,
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in described.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    save_file(weights(walk(tokens)), str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable for its owner only


if __name__ == "__main__":
    write(Path(sys.argv[1]))
