"""What is written from the schema is current and complete."""

from __future__ import annotations

import json
from pathlib import Path

from dynamo_core.config.fields import tables, type_name
from dynamo_core.config.reference import to_json_schema, to_markdown

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "configuration.md"


def test_the_page_is_what_the_command_prints() -> None:
    assert PAGE.read_text("utf-8") == to_markdown(), "run: dynamo config reference > docs/reference/configuration.md"


def test_every_setting_has_a_meaning() -> None:
    silent = [f"{at}.{field.key}" for at, _, listed in tables() for field in listed if not field.doc]
    assert silent == []


def test_types_are_named_for_people() -> None:
    assert not [field for _, _, listed in tables() for field in listed if "<" in type_name(field) or "." in type_name(field)]


def test_the_json_schema_is_json_and_refuses_unknown_keys() -> None:
    schema = json.loads(json.dumps(to_json_schema({"scorer": ["load"]})))
    config = schema["$defs"]["Config"]
    assert config["additionalProperties"] is False
    assert config["properties"]["workers"]["items"] == {"$ref": "#/$defs/Worker"}
    assert schema["$defs"]["Frontend"]["properties"]["port"]["maximum"] == 65535
    assert schema["$defs"]["Router"]["properties"]["scorers"]["items"]["anyOf"][0]["examples"] == ["load"]
    assert schema["$defs"]["Router"]["properties"]["prefill"]["$ref"] == "#/$defs/Router"
    assert schema["$defs"]["Tls"]["required"] == ["cert", "key"]
