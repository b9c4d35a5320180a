"""Make a tiny CLIP of the real architecture, with random weights, in a folder: `python tests/tools/tiny_clip.py DIR`.

About 76,000 parameters, 320 KB, 32 x 32 pixels, vectors of 16.  Two of its buffers are not persistent, as in the real
one.  Loads offline through sentence-transformers; its embeddings mean nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = [("t", "h"), ("th", "e</w>"), ("i", "n"), ("o", "n"), ("a", "n")]
TEXT_LENGTH = 24


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes that byte-level BPE uses: printable Latin-1 as itself, the rest shifted."""
    themselves = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in themselves else chr(next(shifted)) for byte in range(256)]


def tokenizer() -> Any:
    """A CLIP tokenizer that knows single bytes and five merges."""
    from transformers import CLIPTokenizer

    alphabet = byte_alphabet()
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in MERGES), START, END]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=MERGES, model_max_length=TEXT_LENGTH
    )


def build(folder: Path, *, seed: int = 0, safetensors: bool = True) -> Path:
    """Write the model into `folder`, which may be new, and return it; as a pickle without `safetensors`."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    words = tokenizer()
    start, end = words.convert_tokens_to_ids([START, END])
    tower = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(words),
            "max_position_embeddings": TEXT_LENGTH,
            "projection_dim": 16,
            "bos_token_id": start,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        vision_config={**tower, "image_size": 32, "patch_size": 8, "projection_dim": 16},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config).eval()
    # The Pil class by name: the automatic choice would want torchvision.
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    CLIPProcessor(image_processor=pictures, tokenizer=words).save_pretrained(folder)
    if not safetensors:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return folder


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
