"""The travel plan, asked through the `openai` package. Start the server first: `longctx serve`.

python examples/travel/ask.py [http://127.0.0.1:8000]
"""

import sys
import time
from pathlib import Path
from typing import Any

import openai

SCHEMA = Path(__file__).parent / "travel.xml"
QUESTIONS: tuple[tuple[str, list[str], dict[str, str]], ...] = (
    ("What is the name of the hotel in Trieste?", ["trieste"], {"duration": "a long weekend"}),
    ("What is the door code of the hotel in Graz?", ["graz", "rail-pass"], {}),
    ("What is the discount word of the agency?", ["ljubljana", "rail-pass", "discounts"], {}),
)


def main(address: str = "http://127.0.0.1:8000") -> None:
    client = openai.OpenAI(base_url=f"{address.rstrip('/')}/v1", api_key="none")
    model = client.models.list().data[0].id
    schema: dict[str, Any] = client.post(
        "/prompt_cache/schemas", content=SCHEMA.read_bytes(), cast_to=dict[str, Any]
    )
    while schema["state"] not in ("ready", "error"):
        time.sleep(0.1)
        schema = client.get("/prompt_cache/schemas/travel", cast_to=dict[str, Any])
    print(f"schema {schema['name']}: {schema['state']}, {schema['tokens']} tokens computed once\n")
    for question, modules, parameters in QUESTIONS:
        print(question)
        for level in ("modular", "link:16", "exact"):
            chosen = {
                "schema": "travel",
                "modules": modules,
                "parameters": parameters,
                "level": level,
            }
            answer: Any = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=32,
                extra_body={"prompt_cache": chosen},
            )
            used = answer.prompt_cache
            print(
                f"  {level:8} {answer.choices[0].message.content!r:12} "
                f"{used['borrowed_tokens']:4} of {answer.usage.prompt_tokens} tokens reused, "
                f"{answer.longctx['computed_tokens']} computed"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
