"""Our chat templates in Jinja, the form in which a tokenizer carries one.

Written from the same data as `prompt.render`, so that `tokenizer.apply_chat_template` gives the same text.
"""

from __future__ import annotations

import json
import re

from stepwell.language.prompt import ChatTemplate, find_template

__all__ = ["chat_template"]

_JINJA = """\
{%- macro write(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- if content | rejectattr('type', 'in', ['text', 'image', 'image_url']) | list -%}
      {{- raise_exception('content is made of text and pictures only') -}}
    {%- endif -%}
    {%- set pictures = content | selectattr('type', 'in', ['image', 'image_url']) | list | length -%}
    {%- if pictures == 1 -%}
      {%- set text = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join | trim -%}
      {{- '<image>' + ('\\n' + text if text else '') -}}
    {%- else -%}
      {%- for part in content -%}
        {{- part['text'] if part['type'] == 'text' else '<image>' + ('' if loop.last else '\\n') -}}
      {%- endfor -%}
    {%- endif -%}
  {%- endif -%}
{%- endmacro -%}
{%- set system, turns = SYSTEM, messages -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set system, turns = write(messages[0]['content'])TRIM, messages[1:] -%}
{%- endif -%}
{%- if not turns -%}{{- raise_exception('a conversation needs at least one user message') -}}{%- endif -%}
CHECK
{{- OPENING -}}
{%- if system -%}{{- SYSTEM_FRAME -}}{%- endif -%}
{%- for turn in turns -%}
  {%- set text = write(turn['content'])TRIM -%}
  {%- if turn['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('user and assistant take turns, user first') -}}
  {%- elif turn['role'] == 'user' -%}
    {{- USER -}}
  {%- elif not text | trim -%}
    {{- raise_exception('an assistant message is empty') -}}
  {%- else -%}
    {{- HEADER + ANSWER -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {%- if turns[-1]['role'] != 'user' -%}
    {{- raise_exception('a generation prompt follows a user message') -}}
  {%- endif -%}
  {{- HEADER -}}
{%- endif -%}
"""
_JINJA_PLAIN_CHECK = """\
{%- set captioned = turns | length == 2 and '<image>' in write(turns[0]['content']) -%}
{%- if system or add_generation_prompt or not captioned -%}
  {{- raise_exception("template 'plain' holds one picture and its caption, and nothing else") -}}
{%- endif -%}"""


def chat_template(template: str | ChatTemplate) -> str:
    """The template in Jinja, for `tokenizer.chat_template`: the text, and the refusals, of `render`."""
    chat = find_template(template)

    def filled(frame: str, text: str) -> str:
        before, after = frame.split("{}")
        return f"{_quoted(before)} + {text} + {_quoted(after)}"

    user = "'<image>'" if chat.name == "plain" else "text"
    first, later = filled(chat.user_frame(0), user), filled(chat.user_frame(1), user)
    filling = {
        "SYSTEM_FRAME": filled(chat.system_frame, "system"),
        "SYSTEM": _quoted(chat.system),
        "OPENING": _quoted(chat.opening),
        "USER": first if first == later else f"({first} if loop.first else {later})",
        "HEADER": _quoted(chat.header),
        "ANSWER": filled(chat.answer + chat.closing, "text"),
        "TRIM": " | trim" if chat.trim else "",
        "CHECK": _JINJA_PLAIN_CHECK if chat.name == "plain" else "",
    }
    return re.sub(r"\b(" + "|".join(filling) + r")\b", lambda match: filling[match[0]], _JINJA)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # JSON's escapes are Jinja's
