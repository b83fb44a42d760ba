"""Let a served model call a function: two turns through the OpenAI client, with either engine's server.

vllm serve MODEL --enable-auto-tool-choice --tool-call-parser hermes
python -m sglang.launch_server --model-path MODEL --port 8000 --tool-call-parser qwen
For Qwen3-Coder-Next the parser is qwen3_coder on both engines.

pip install openai
python examples/tools.py http://127.0.0.1:8000/v1
"""

import json
import sys

from openai import OpenAI

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def get_weather(city: str) -> str:
    return json.dumps({"temperature": 17, "sky": "cloudy"})


def main(url: str) -> None:
    client = OpenAI(base_url=url, api_key="none")
    model = client.models.list().data[0].id
    messages: list = [{"role": "user", "content": "What is the weather in Kalholm?"}]
    options = {"model": model, "tools": TOOLS, "temperature": 0, "max_tokens": 512}
    answer = client.chat.completions.create(messages=messages, tool_choice="auto", **options).choices[0].message
    if answer.tool_calls:
        messages.append(answer)
        for call in answer.tool_calls:
            result = get_weather(**json.loads(call.function.arguments))
            print(f"the model calls {call.function.name}({call.function.arguments}), which returns: {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        answer = client.chat.completions.create(messages=messages, **options).choices[0].message
    print(answer.content)


if __name__ == "__main__":
    main(*sys.argv[1:])
