"""Tokens per second of transformers' `generate` with a GPT-2 folder, greedy, one sequence, its key/value cache on; one line a run.

usage: generate_torch.py FOLDER PROMPT_TOKENS NEW_TOKENS RUNS
"""

import sys
import time

import torch
from transformers import GPT2LMHeadModel

folder, prompt, new, runs = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
model.generation_config.eos_token_id = None
ids = torch.arange(prompt).unsqueeze(0) % 100
with torch.inference_mode():
    for run in range(runs + 1):
        start = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0)
        took = time.perf_counter() - start
        assert out.shape == (1, prompt + new)
        if run > 0:  # the first one warms up
            print(f"{new / took:.2f}", flush=True)
