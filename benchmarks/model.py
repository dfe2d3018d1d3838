"""A model folder without weights, the same bytes on every machine: a 32,000-entry BPE over invented words, a chat template, a configuration.

Every system under test loads the same folder. Each word of the prompts is one token, so that "500 words in" means the same for all.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SIZE = 32_000
CONTEXT = 32_768
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_WORDS = 40_000
_SPOKEN = 2_000
"""The most frequent words: those that prompts are made of."""


def words() -> list[str]:
    """Words for prompts."""
    return _invented()[:_SPOKEN]


def build(folder: Path) -> Path:
    """Write the model into `folder`, unless it is there."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = SPECIAL.index("<|im_end|>")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE, "model_max_length": CONTEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "vocab_size": SIZE, "rms_norm_eps": 1e-5,
        "bos_token_id": 0, "eos_token_id": end, "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))  # last: its presence says that the folder is complete
    return folder


def _invented() -> list[str]:
    """Words of one to four syllables, the most frequent first."""
    dice = random.Random(7)
    syllables = [first + vowel + last for first in "bcdfghjklmnprstvwz" for vowel in "aeiou" for last in ("", "n", "r", "s", "t")]
    found: dict[str, None] = {}
    while len(found) < _WORDS:
        found["".join(dice.choice(syllables) for _ in range(dice.choice((1, 2, 2, 2, 3, 3, 4))))] = None
    return list(found)


def _corpus() -> list[str]:
    """Each word as often as Zipf's law has it, each time behind a space, as in a sentence."""
    return [f" {word}" * (1 + 60_000 // rank) for rank, word in enumerate(_invented(), 10)]


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
