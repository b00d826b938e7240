"""Make a tiny Qwen2-style model folder without weights, to try the gate on a machine without GPUs.

vLLM fills in random weights (``--load-format dummy``). Usage: python make_model.py FOLDER [--heads N] [--hidden N]
[--layers N]; a larger one has longer engine steps, which vary less on a machine with few cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 512


def config(heads: int, hidden: int, layers: int) -> dict[str, object]:
    """Return a config.json; each head has hidden / heads dimensions."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 256,
        "eos_token_id": 257,
        "hidden_act": "silu",
    }


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|eos|>"])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--heads", type=int, default=4, help="attention heads; 4 give the usual size of 64")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size; the MLP has twice as many")
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    model = config(arguments.heads, arguments.hidden, arguments.layers)
    (folder / "config.json").write_text(json.dumps(model, indent=1) + "\n")


if __name__ == "__main__":
    main()
