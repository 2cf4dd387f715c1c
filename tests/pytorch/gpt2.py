"""GPT-2 as Hugging Face's transformers has it, for the tests of `lm export` and `lm import` (transformer-lm/tests/interchange.rs).

usage: gpt2.py make FOLDER SEED DTYPE SHARD_SIZE   a small random model, saved as its users save theirs
       gpt2.py logits FOLDER IN OUT                `ids` (B, T) of a safetensors file to `logits` (B, T, vocabulary) in f32
       gpt2.py tokens FOLDER IN OUT                lines of text to lines of token ids; fails where they do not come back as the text
"""

import json
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel


def make(folder, seed, dtype, shard_size):
    torch.manual_seed(int(seed))
    config = GPT2Config(vocab_size=97, n_positions=24, n_embd=32, n_layer=3, n_head=4, n_inner=80, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)


def logits(folder, source, target):
    model, loading = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    unexpected = {name: names for name, names in loading.items() if names}
    assert not unexpected, unexpected
    with torch.no_grad():
        save_file({"logits": model.eval()(load_file(source)["ids"]).logits.contiguous()}, target)


def tokens(folder, source, target):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open(source, encoding="utf-8") as texts, open(target, "w") as out:
        for text in map(json.loads, texts):
            ids = tokenizer.encode(text)
            back = tokenizer.decode(ids)
            assert back == text, (text, ids, back)
            out.write(json.dumps(ids) + "\n")


if __name__ == "__main__":
    {"make": make, "logits": logits, "tokens": tokens}[sys.argv[1]](*sys.argv[2:])
