"""An agent of qwen-agent, with a tool of its own, on a served model.

vllm serve MODEL
pip install qwen-agent
python examples/agent.py http://127.0.0.1:8000/v1 MODEL
"""

import json
import sys

from qwen_agent.agents import Assistant
from qwen_agent.tools.base import BaseTool, register_tool


@register_tool("weather")
class Weather(BaseTool):
    description = "The weather in a city now."
    parameters = [{"name": "city", "type": "string", "description": "name of the city", "required": True}]  # noqa: RUF012

    def call(self, params: str, **_: object) -> str:
        return f"Rain in {json.loads(params)['city']}, 12 degrees."


def main(url: str, model: str) -> None:
    llm = {
        "model": model,
        "model_server": url,
        "api_key": "none",
        "generate_cfg": {"temperature": 0.7, "top_p": 0.8, "max_tokens": 512},
    }
    agent = Assistant(llm=llm, function_list=["weather"])
    *_, messages = agent.run([{"role": "user", "content": "Do I need an umbrella in Paris?"}])  # each is longer
    for message in messages:
        print(f"{message['role']}: {message.get('function_call') or message['content']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
