"""Writes a Llama of 2.5 million random parameters with a byte-level tokenizer.

One token is one ASCII character, and no model hub is needed. It runs inside the engine's own
environment, started by kvfs.tools.engine_demo, and never imports kvfs.

usage: make_tiny_model.py DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<s>", "</s>", "<unk>", "<pad>")
VOCABULARY_SIZE = 264  # 256 bytes and the special tokens, rounded up to a multiple of 8
WEIGHT_SCALE = 4.0


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer without merges, so that a token is a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, *SPECIAL_TOKENS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


def random_llama() -> LlamaForCausalLM:
    """Four layers with two KV heads of 64: 2 KiB of KV cache per token in bfloat16."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=4096,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=259,
        )
    ).to(torch.bfloat16)
    # With the default initialisation the logits hardly depend on the context, and wrong KV bytes
    # would still give the same tokens.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(WEIGHT_SCALE)
    return model


def main(directory: Path) -> None:
    byte_tokenizer().save_pretrained(directory)
    random_llama().save_pretrained(directory, safe_serialization=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
