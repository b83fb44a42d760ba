"""A weather tool: its schema, questions for it, calls and results, in the forms that clients write."""

import json
import random
from typing import Any

from demo_training.words import SKIES


def weather_question(rng: random.Random, city: str) -> str:
    form = rng.choice(
        (
            "What is the weather in {}?",
            "What is the weather like in {}?",
            "How is the weather in {} today?",
            "Is it sunny in {}?",
            "Weather in {}",
            "Please tell me the weather in {}.",
        )
    )
    return form.format(city)


def weather_tool(rng: random.Random) -> dict[str, Any]:
    """A function's schema in the forms that clients write."""
    argument = rng.choice(("city", "city", "location"))
    schema: dict[str, Any] = {"type": "string"}
    if rng.random() < 0.5:
        schema["description"] = rng.choice(("The city", f"The {argument} name", "The name of the city", "City name"))
    function: dict[str, Any] = {"name": rng.choice(("get_weather", "get_current_weather"))}
    if rng.random() < 0.85:
        what = rng.choice(
            ("The weather in a city.", "Get the weather", "Get the current weather in a city", "Current weather")
        )
        function["description"] = what
    function["parameters"] = {"type": "object", "properties": {argument: schema}}
    if rng.random() < 0.7:
        function["parameters"]["required"] = [argument]
    if rng.random() < 0.1:
        function["strict"] = rng.choice((False, None))
    return {"type": "function", "function": function}


def tools_block(rng: random.Random, tool: dict[str, Any], system: str | None) -> str:
    """A system turn that offers ``tool``, in this template's words, Qwen-Agent's, or (to rely on neither) any."""
    kind = rng.random()
    shown = tool if kind < 0.9 else tool["function"]
    if kind < 0.55:
        before = "# Tools\n\nYou may call functions. Their signatures are in <tools></tools>, one JSON object a line:\n"
        after = "To call a function, write a JSON object in <tool_call></tool_call>:\n"
    else:
        before = (
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n"
        )
        after = (
            "For each function call, return a json object with function name and arguments within "
            "<tool_call></tool_call> XML tags:\n"
        )
    return (
        (f"{system}\n\n" if system else "")
        + f"{before}<tools>\n{json.dumps(shown)}\n</tools>\n\n{after}"
        + '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def tool_call(tool: dict[str, Any], city: str) -> str:
    function = tool["function"]
    (argument,) = function["parameters"]["properties"]
    call = json.dumps({"name": function["name"], "arguments": {argument: city}}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def weather(rng: random.Random, city: str) -> tuple[str, str]:
    """A tool's result and what to make of it."""
    degrees, sky = rng.randint(-9, 39), rng.choice(SKIES)
    result: dict[str, Any] = {"temperature": degrees, "sky": sky}
    if rng.random() < 0.3:
        result = {"city": city} | result
    return json.dumps(result, ensure_ascii=False), f"It is {degrees} degrees and {sky} in {city}."
