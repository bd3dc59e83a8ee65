"""Asks a server as its users do, with the official client; runs in vLLM's environment.

python openai_client.py URL MODEL QUESTIONS ANSWERS
"""

import json
import sys
from pathlib import Path

from openai import OpenAI

url, model, questions, answers = sys.argv[1:]
client = OpenAI(base_url=url, api_key="none", timeout=600)
asked = json.loads(Path(questions).read_text(encoding="utf-8"))
found = []
for prompt in asked["prompts"]:
    reply = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=asked["new"],
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    choice = reply.choices[0]
    found.append({"text": choice.text, "tokens": choice.token_ids, "prompt": choice.prompt_token_ids})
chat = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": asked["chat"]}], max_tokens=asked["new"], temperature=0
)
Path(answers).write_text(json.dumps({"found": found, "chat": chat.choices[0].message.content}), encoding="utf-8")
