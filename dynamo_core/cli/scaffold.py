"""The files of a new plugin, for each kind that has a scaffold."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from dynamo_core import __version__


@attrs.frozen
class Scaffold:
    """What differs from kind to kind. `@Class@`, `@name@` and so on are filled in by `project`."""

    module: str
    """Of the implementation, in the package."""
    summary: str
    code: str
    fixture: str
    """The body of the contract test class."""
    contract: str
    stack: str
    """The part of a configuration that selects it."""
    option: str = ""
    """One option, for the README: `name | default | meaning`."""


_SCORER = '''\
"""@Summary@."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from attrs import validators as v

from dynamo_core.routing.contract import Fleet, RoutingRequest
from dynamo_core.routing.facts import IN_FLIGHT


@attrs.frozen
class @Class@:
    """@Summary@. Its fields are its options in the configuration."""

    spread: float = attrs.field(default=8.0, validator=v.gt(0))
    """Requests in progress at which the score is one half."""

    needs = (IN_FLIGHT,)

    def score(self, request: RoutingRequest, fleet: Fleet) -> Sequence[float]:
        return [self.spread / (self.spread + in_flight) for in_flight in fleet[IN_FLIGHT]]
'''

_FILTER = '''\
"""@Summary@."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
from attrs import validators as v

from dynamo_core.routing.contract import Fleet, RoutingRequest
from dynamo_core.routing.facts import IN_FLIGHT


@attrs.frozen
class @Class@:
    """@Summary@. Its fields are its options in the configuration."""

    limit: int = attrs.field(default=64, validator=v.ge(1))
    """Requests in progress from which a worker gets no more."""

    needs = (IN_FLIGHT,)

    def reject(self, request: RoutingRequest, fleet: Fleet) -> Mapping[int, str]:
        return {row: f"{n} requests in progress, the limit is {self.limit}" for row, n in enumerate(fleet[IN_FLIGHT]) if n >= self.limit}
'''

_PICKER = '''\
"""@Summary@."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from attrs import validators as v

from dynamo_core.routing.contract import Dice, Fleet


@attrs.frozen
class @Class@:
    """@Summary@. Its fields are its options in the configuration."""

    margin: float = attrs.field(default=0.0, validator=v.ge(0))
    """Totals that are less than this below the best count as best."""

    def pick(self, totals: Sequence[float], fleet: Fleet, dice: Dice) -> int:
        least = max(totals) - self.margin
        good = [row for row, total in enumerate(totals) if total >= least]
        return good[dice.below(len(good))]
'''

# The larger kinds begin as a built-in one and replace its methods one by one, so that the contract holds from the first day on.

_SUBCLASS = '''\
"""@Summary@."""

from __future__ import annotations

import attrs

from {module} import {base}


@attrs.define(eq=False)
class @Class@({base}):
    """@Summary@.

    It begins as the built-in {base}: replace its methods one by one (`{contract}` says what each must do), and remove the
    base class when none is left. Its fields are its options in the configuration.
    """

    note: str = ""
    """An option that does nothing yet."""
'''


def _fixture(kind: str) -> str:
    return f"""\
    @pytest.fixture
    def {kind}(self) -> @Class@:
        return @Class@()
"""


_ENGINE_FIXTURES = """\
    @pytest.fixture
    def engine_factory(self) -> type[@Class@]:
        return @Class@

    @pytest.fixture
    def prompt(self) -> list[int]:
        return list(b"once upon a time")
"""

_DISCOVERY_FIXTURE = """\
    @pytest.fixture
    def connect(self) -> type[@Class@]:
        return @Class@
"""

_EVENTS_FIXTURE = """\
    @pytest.fixture
    def make(self) -> Callable[[], @Class@]:
        return lambda: @Class@(receive_queue=self.backlog)
"""

_REQUESTS_FIXTURE = """\
    listens = False  # until it has an address of its own

    @pytest.fixture
    async def plane(self) -> @Class@:
        return @Class@()
"""

_FILLED = """\
# A stack that uses it: dynamo up stack.toml

[router]
{line}

[[workers]]
count = 2
engine = "echo"
"""

_NOTE = '`note` | `""` | Nothing yet.'

SCAFFOLDS: Mapping[str, Scaffold] = {
    "scorer": Scaffold(
        module="policy", summary="Prefers workers with few requests in progress", code=_SCORER, contract="ScorerContract", fixture=_fixture("scorer"),
        stack=_FILLED.format(line='scorers = [{ use = "@name@", weight = 1.0, spread = 8.0 }]'),
        option="`spread` | `8.0` | Requests in progress at which the score is one half.",
    ),
    "filter": Scaffold(
        module="policy", summary="Drops workers that have many requests in progress", code=_FILTER, contract="FilterContract", fixture=_fixture("filter"),
        stack=_FILLED.format(line='filters = [{ use = "@name@", limit = 64 }]\nscorers = ["turn"]'),
        option="`limit` | `64` | Requests in progress from which a worker gets no more.",
    ),
    "picker": Scaffold(
        module="policy", summary="Picks any of the best workers", code=_PICKER, contract="PickerContract", fixture=_fixture("picker"),
        stack=_FILLED.format(line='scorers = ["load"]\npicker = { use = "@name@", margin = 0.0 }'),
        option="`margin` | `0.0` | Totals that are less than this below the best count as best.",
    ),
    "engine": Scaffold(
        module="engine", summary="Generates tokens", contract="EngineContract", fixture=_ENGINE_FIXTURES,
        code=_SUBCLASS.format(module="dynamo_core.engines.echo", base="EchoEngine", contract="dynamo_core.engines.contract"),
        stack='[[workers]]\nengine = { use = "@name@", note = "" }\n', option=_NOTE,
    ),
    "discovery": Scaffold(
        module="store", summary="Keeps the records of a fleet", contract="DiscoveryContract", fixture=_DISCOVERY_FIXTURE,
        code=_SUBCLASS.format(module="dynamo_core.discovery.memory", base="MemoryDiscovery", contract="dynamo_core.discovery.contract"),
        stack='[discovery]\nuse = "@name@"\nnote = ""\n', option=_NOTE,
    ),
    "event_plane": Scaffold(
        module="plane", summary="Carries events from publishers to subscribers", contract="EventPlaneContract", fixture=_EVENTS_FIXTURE,
        code=_SUBCLASS.format(module="dynamo_core.events.inprocess", base="InProcessEvents", contract="dynamo_core.events.contract"),
        stack='[event_plane]\nuse = "@name@"\nnote = ""\n', option=_NOTE,
    ),
    "request_plane": Scaffold(
        module="plane", summary="Carries requests to workers", contract="RequestPlaneContract", fixture=_REQUESTS_FIXTURE,
        code=_SUBCLASS.format(module="dynamo_core.transport.inprocess", base="InProcessPlane", contract="dynamo_core.transport.contract")
        .replace("attrs.define(eq=False)", "attrs.frozen"),
        stack='[request_plane]\nuse = "@name@"\nnote = ""\n', option=_NOTE,
    ),
}

_PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.25"]
build-backend = "hatchling.build"

[project]
name = "@distribution@"
version = "0.1.0"
description = "@Summary@ (@article@ @spoken@ for dynamo)."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["attrs>=25.3", "dynamo-core>=@core@,<1"]

[project.optional-dependencies]
test = ["dynamo-core[testing]", "pytest>=8"]

[project.entry-points.dynamo]
@name@ = "@package@"

[tool.hatch.build.targets.wheel]
packages = ["src/@package@"]

[tool.pytest.ini_options]
addopts = "--import-mode=importlib"
asyncio_mode = "auto"
asyncio_default_fixture_loop_scope = "function"
testpaths = ["tests"]
"""

_INIT = '''\
"""@Summary@: @article@ @spoken@ for dynamo. This module only announces it; the implementation is imported when a stack selects it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_core import hookimpl

if TYPE_CHECKING:
    from dynamo_core.plugins import Registry


@hookimpl
def dynamo_register(registry: Registry) -> None:
    registry.@kind@("@name@", "@package@.@module@:@Class@", summary="@summary@", stability="alpha")
'''

_README = """\
# @distribution@

@Summary@: @article@ @spoken@ for dynamo.

    pip install @distribution@

Select it in the configuration of a stack (`stack.toml` is a whole one):

```toml
@stack@```

## Options

| option | default | meaning |
|---|---|---|
| @option@ |

## Development

    pip install -e '.[test]'
    pytest
    dynamo plugin check .
"""

_TEST = '''\
"""The @spoken@ keeps the contract that every @spoken@ keeps."""

from __future__ import annotations

@imports@import pytest
from dynamo_core.contracts import @contract@

from @package@.@module@ import @Class@


class Test@Class@(@contract@):
@fixture@'''

_GITIGNORE = "__pycache__/\n*.egg-info/\ndist/\n.venv/\n"


def project(kind: str, name: str) -> dict[str, str]:
    """Content by path, relative to the project's directory."""
    scaffold = SCAFFOLDS[kind]
    distribution = f"dynamo-{name}"
    words = {
        "kind": kind,
        "spoken": kind.replace("_", " "),
        "article": "an" if kind[0] in "aeiou" else "a",
        "name": name,
        "distribution": distribution,
        "package": distribution.replace("-", "_"),
        "Class": "".join(part.capitalize() for part in name.split("-")),
        "module": scaffold.module,
        "Summary": scaffold.summary,
        "summary": scaffold.summary[0].lower() + scaffold.summary[1:],
        "contract": scaffold.contract,
        "option": scaffold.option,
        "core": ".".join(__version__.split(".")[:2]),
    }
    files = {
        "pyproject.toml": _PYPROJECT,
        "README.md": _README,
        ".gitignore": _GITIGNORE,
        "stack.toml": scaffold.stack,
        f"src/{words['package']}/__init__.py": _INIT,
        f"src/{words['package']}/{scaffold.module}.py": scaffold.code,
        f"src/{words['package']}/py.typed": "",
        "tests/test_contract.py": _TEST,
    }
    imports = "from collections.abc import Callable\n\n" if "Callable[" in scaffold.fixture else ""
    blocks = {"stack": scaffold.stack, "fixture": scaffold.fixture, "imports": imports}
    return {path: _fill(_fill(content, blocks), words) for path, content in files.items()}


def _fill(template: str, words: Mapping[str, str]) -> str:
    for word, text in words.items():
        template = template.replace(f"@{word}@", text)
    return template
