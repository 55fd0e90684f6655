"""Our chat templates: those of the LLaVA family, as Jinja files in templates/.

LLaVA-1.5 (arXiv 2310.03744), LLaVA-NeXT and INF-LLaVA (arXiv 2407.16198). They read as transformers' chat
templates do, with `{% generation %}` around what a model learns to say. Two files that all share stand in
front of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["TEMPLATES", "Template", "find_template", "template_of", "write_content"]


@dataclass(frozen=True, slots=True)
class Template:
    """One of our templates, and what its file does not tell.

    special: the special tokens it writes. header, next_tokens: what LLaVA-NeXT supervises beside answers, the
    header in front of each and some tokens wherever they stand; empty where that code has no such mask.
    """

    name: str
    special: tuple[str, ...] = ()
    header: str = ""
    next_tokens: tuple[str, ...] = ()

    @property
    def jinja(self) -> str:
        return _file("content") + _file("turns") + _file(self.name)


_LLAMA_3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_LLAMA_3_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_CHATML = ("<|im_start|>", "<|im_end|>")
_CHATML_HEADER = "<|im_start|>assistant\n"

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("plain"),
        Template("vicuna_v1", ("</s>",)),
        Template("llama_2", ("<s>", "</s>")),
        Template("llama3_inf", _LLAMA_3),
        Template("llama3_next", _LLAMA_3, _LLAMA_3_HEADER, _LLAMA_3),
        Template("chatml_direct", _CHATML),
        Template("qwen", _CHATML, _CHATML_HEADER, (*_CHATML, "\n")),
        Template("qwen2_5", _CHATML, _CHATML_HEADER, (*_CHATML, "\n")),
    )
}
"""By name; `qwen2_5` is `qwen` with the other system sentence."""


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
def _file(name: str) -> str:
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text("utf-8")
