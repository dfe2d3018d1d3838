"""A tiny Llama of random weights in Hugging Face's form, always the same one: `python tiny_model.py DIRECTORY`.

Its answers are noise, and always the same noise; everything around the weights is real: the tokenizer, the chat template, vLLM.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
TEXT = """The quick brown fox jumps over the lazy dog. It's 12345 o'clock, we'll see; they've said DON'T!
What is the capital of France? The capital of France is Paris. Two and two make four, and three and three make six.
def tokenize(text: str) -> list[int]:
    for i in range(10):
        if text[i] == "\\n":
            return []
{"json": [1, 2, 3], "nested": {"a": null, "b": true}, "name": "value"}
Größe, façade, naïve; Привет, мир! 你好，世界！こんにちは世界 안녕하세요 😀🎉🚀
"""
VOCABULARY, WIDTH, INNER, LAYERS, HEADS, KV_HEADS, CONTEXT = 1024, 128, 256, 2, 4, 2, 4096


def make(directory: Path) -> Path:
    """Write the model once; a directory that has it is left as it is."""
    if (directory / "model.safetensors").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    _tokenizer(directory)
    _weights(directory)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": WIDTH // HEADS,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "torch_dtype": "float32",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3], "temperature": 0.9, "top_p": 0.95}))
    return directory


def make_classifier(directory: Path, labels: tuple[str, ...] = ("good", "bad", "neither"), seed: int = 13) -> Path:
    """The Llama with a head for classes instead of words. With one label it scores: "llm as reranker"."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    make(directory)
    tensors = load_file(str(directory / "model.safetensors"))
    del tensors["lm_head.weight"]
    tensors["score.weight"] = np.random.default_rng(seed).normal(0, 0.3, (len(labels), WIDTH)).astype(np.float32)
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": len(labels), "use_sep_token": False,
               "id2label": {str(i): label for i, label in enumerate(labels)}, "label2id": {label: i for i, label in enumerate(labels)}}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory


def make_cross_encoder(directory: Path) -> Path:
    """A BERT that scores pairs of texts, which it tells apart by segments."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    directory.mkdir(parents=True, exist_ok=True)
    _tokenizer(directory, pairs=True)
    torch.manual_seed(17)
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=INNER,
                        max_position_embeddings=512, num_labels=1, initializer_range=0.3, pad_token_id=0)  # fmt: skip
    BertForSequenceClassification(config).float().save_pretrained(directory)
    return directory


def make_seeing(directory: Path) -> Path:
    """An Idefics3 of half a million random weights: images of 28 x 28 pixels, one token each."""
    import torch
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
        LlamaConfig,
        PreTrainedTokenizerFast,
    )

    directory.mkdir(parents=True, exist_ok=True)
    _tokenizer(directory)
    names = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": list(names.values())})
    for name, text in names.items():
        setattr(tokenizer, name, text)
    template = ("{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}"
                "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")  # fmt: skip
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 28}, max_image_size={"longest_edge": 28}, do_image_splitting=False)
    Idefics3Processor(image_processor=pictures, tokenizer=tokenizer, image_seq_len=1, chat_template=template).save_pretrained(directory)
    torch.manual_seed(5)
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                       num_key_value_heads=KV_HEADS, max_position_embeddings=CONTEXT, initializer_range=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=0)  # fmt: skip
    sight = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = Idefics3Config(vision_config=sight, text_config=text.to_dict(), image_token_id=image_token, scale_factor=2, pad_token_id=0)
    Idefics3ForConditionalGeneration(config).float().save_pretrained(directory)
    return directory


def _tokenizer(directory: Path, *, pairs: bool = False) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    if pairs:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|user|> $A <|end|>", pair="<|user|> $A <|end|> $B:1 <|end|>:1", special_tokens=[("<|user|>", 1), ("<|end|>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>", "chat_template": TEMPLATE,
             "clean_up_tokenization_spaces": False, "model_max_length": CONTEXT}  # fmt: skip
    if pairs:
        about["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (directory / "tokenizer_config.json").write_text(json.dumps(about, indent=1))


def _weights(directory: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    dice = np.random.default_rng(7)

    def weights(*shape: int, scale: float = 0.3) -> Any:
        return dice.normal(0, scale, shape).astype(np.float32)

    head = WIDTH // HEADS
    tensors = {"model.embed_tokens.weight": weights(VOCABULARY, WIDTH), "model.norm.weight": np.ones(WIDTH, np.float32), "lm_head.weight": weights(VOCABULARY, WIDTH)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        tensors |= {
            layer + "input_layernorm.weight": np.ones(WIDTH, np.float32), layer + "post_attention_layernorm.weight": np.ones(WIDTH, np.float32),
            layer + "self_attn.q_proj.weight": weights(WIDTH, WIDTH), layer + "self_attn.k_proj.weight": weights(head * KV_HEADS, WIDTH),
            layer + "self_attn.v_proj.weight": weights(head * KV_HEADS, WIDTH), layer + "self_attn.o_proj.weight": weights(WIDTH, WIDTH),
            layer + "mlp.gate_proj.weight": weights(INNER, WIDTH), layer + "mlp.up_proj.weight": weights(INNER, WIDTH),
            layer + "mlp.down_proj.weight": weights(WIDTH, INNER),
        }  # fmt: skip
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})


def make_adapter(directory: Path, seed: int = 11, rank: int = 8) -> Path:
    """A LoRA adapter of the model that changes what it says."""
    import numpy as np
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    dice = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for i in range(LAYERS):
        for name in ("q_proj", "v_proj"):
            out = WIDTH if name == "q_proj" else WIDTH // HEADS * KV_HEADS
            base = f"base_model.model.model.layers.{i}.self_attn.{name}."
            tensors[base + "lora_A.weight"] = dice.normal(0, 0.5, (rank, WIDTH)).astype(np.float32)
            tensors[base + "lora_B.weight"] = dice.normal(0, 0.5, (out, rank)).astype(np.float32)
    save_file(tensors, str(directory / "adapter_model.safetensors"), metadata={"format": "pt"})
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "v_proj"], "bias": "none", "task_type": "CAUSAL_LM",
             "base_model_name_or_path": "tiny"}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(about))
    return directory


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
