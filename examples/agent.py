"""An agent of qwen-agent, with a tool of its own, on a served model.

vllm serve MODEL
pip install qwen-agent
python examples/agent.py http://127.0.0.1:8000/v1 MODEL
"""

import json
import sys

from qwen_agent.agents import Assistant
from qwen_agent.tools.base import BaseTool, register_tool


@register_tool("get_weather")
class Weather(BaseTool):
    description = "The weather in a city."
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}  # noqa: RUF012

    def call(self, params: str, **_: object) -> str:
        return json.dumps({"temperature": 17, "sky": "cloudy"})


def main(url: str, model: str) -> None:
    llm = {
        "model": model,
        "model_server": url,
        "api_key": "none",
        "generate_cfg": {"temperature": 0, "max_tokens": 512},
    }
    agent = Assistant(llm=llm, function_list=["get_weather"])
    *_, messages = agent.run([{"role": "user", "content": "What is the weather in Kalholm?"}])  # each is longer
    for message in messages:
        print(f"{message['role']}: {message.get('function_call') or message['content']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
