"""Our chat templates: those of the LLaVA family, as Jinja files in templates/.

LLaVA-1.5 (arXiv 2310.03744), LLaVA-NeXT and INF-LLaVA (arXiv 2407.16198). They read as transformers' chat
templates do, with `{% generation %}` around what a model learns to say. Two files that all share stand in
front of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template as JinjaTemplate
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["TEMPLATES", "Template", "find_template", "template_of", "write_content"]


@dataclass(frozen=True, slots=True)
class Template:
    """One of our templates: its file and, where it differs from another only in what it sets, that one's.

    special: the special tokens it writes.
    """

    name: str
    special: tuple[str, ...] = ()
    base: str | None = None

    def write(self, **variables: Any) -> str:
        """What the template makes of a conversation in which nothing is marked, without transformers.

        Raises jinja2.TemplateError for a conversation that it refuses.
        """
        return _compiled(self.jinja).render(**variables)

    @property
    def jinja(self) -> str:
        return _file("content") + _file("turns") + _file(self.name) + (_file(self.base) if self.base else "")


_LLAMA_3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHATML = ("<|im_start|>", "<|im_end|>")

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("plain"),
        Template("vicuna_v1", ("</s>",)),
        Template("llama_2", ("<s>", "</s>")),
        Template("llama3", _LLAMA_3),
        Template("llama3_inf", _LLAMA_3, base="llama3"),
        Template("mistral", ("</s>",)),
        Template("llama3_next", _LLAMA_3),
        Template("chatml_direct", _CHATML),
        Template("qwen", _CHATML),
        Template("qwen2_5", _CHATML, base="qwen"),
    )
}
"""By name; `qwen2_5` is `qwen` with another system sentence, `llama3_inf` is `llama3` behind one more BOS."""


def find_template(name: str) -> Template:
    """Raises ValueError naming the templates there are."""
    if name not in TEMPLATES:
        raise ValueError(f"unknown chat template {name!r}; choose from {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def template_of(jinja: object) -> Template | None:
    """The template of ours that reads so."""
    return next((template for template in TEMPLATES.values() if template.jinja == jinja), None)


def write_content() -> str:
    """A template that writes the content of one message as ours do, parts as one text."""
    return _file("content") + "{{- write(messages[0]) -}}"


@cache
def _compiled(jinja: str) -> JinjaTemplate:
    """As transformers compiles it, the mark of what is generated without its meaning."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    jinja = jinja.replace("{%- generation -%}", "{%- if true -%}")
    return environment.from_string(jinja.replace("{%- endgeneration -%}", "{%- endif -%}"))


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


@cache
def _file(name: str) -> str:
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text("utf-8")
