#!/usr/bin/env python3
"""Writes golden.json: what Python's jinja2, set up as Hugging Face's apply_chat_template does, makes of
the templates in this file and of those stored in the model files given.

    make_golden.py golden.json [MODEL.gguf ...]

jinja2 3.1.6 wrote the committed file. Templates of model files are not stored, only their results.
"""
import datetime
import json
import pathlib
import struct
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox

NOW = 1719876543  # 2024-07-01 23:29:03 UTC; tests run in UTC


def environment():
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    env.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: \
        json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda format: \
        datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc).strftime(format)
    return env


# Small templates, one or a few constructs each; the variables are VARIABLES.
VARIABLES = {
    "name": "World", "empty": "", "n": 7, "x": 2.5, "yes": True, "no": False, "nothing": None,
    "text": "  Grüße,  an alle!\n", "words": ["b", "a", "C", "a"], "numbers": [3, 1, 2],
    "data": {"b": 1, "a": [1, 2.0, None, True, "q\"'\\\n\u00e9😀"], "C": {}},
    "people": [{"name": "Ann", "age": 5, "tags": ["x"]}, {"name": "Bob", "tags": []},
               {"name": "Cy", "age": 9, "tags": ["y", "z"]}],
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi "},
                 {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Why?"}],
}
SNIPPETS = [
    # printing
    "Hello {{ name }}!", "{{ n }} {{ x }} {{ yes }} {{ nothing }} {{ missing }}|", "{{ words }} {{ data }}",
    "{{ 1.0 }} {{ 1e3 }} {{ 1e16 }} {{ 1.5e-7 }} {{ 0.1 + 0.2 }} {{ 1/3 }} {{ 100000000000000000.0 }}",
    "{{ 'it''s' }} {{ \"a\\tb\\\"\" }} {{ 'caf\\u00e9 \\x41' }} {{ ['it\\'s', 'a\"b', 'both\\'\"', 'n\\n'] }}",
    "{{ (1, 2) }} {{ (1,) }} {{ () }} {{ 1, 2 }} {{ [] }} {{ {} }} {{ {'k': [1, {'j': None}]} }}",
    # white space
    "a\n  {% if yes %}\n  b\n  {% endif %}\nc\n", "a\n  {%- if yes -%}\n  b\n  {%- endif -%}\nc\n",
    "a  {{- name -}}  b", "a\n{{ name }}\nb\n\n", "  {% if yes %} x {% endif %}  y", "x {% if yes %}\n y{% endif %}\n",
    "a\n  {# note #}\nb {# note #} c\n{#- note -#}\n d", "{%+ if yes %}\n  a{% endif +%}\nb", "\n\n{% if yes %}\n\na{% endif %}",
    "a\r\n{% if yes %}\r\nb\r\n{% endif %}\r\n", "{% raw %}{{ x }} {% if %}{% endraw %}|", "a\n  {%- raw -%}\n {{ y }} \n{%- endraw %}\nb",
    "{{ '%}' }}{{ '}}' }}{{ {'a': 1}['a'] }}", "{%- for i in [1,2] -%}\n  {{- i }}\n{% endfor %}", "   {{ name }}", "a\t{%- set q = 1 %}\t b",
    # conditions
    "{% if n > 5 and not no %}A{% elif yes %}B{% else %}C{% endif %}", "{% if no %}A{% elif n == 7 %}B{% endif %}",
    "{% if missing %}A{% else %}B{% endif %}{% if empty or words %}C{% endif %}", "{{ 'a' if no }}|{{ 'a' if no else 'b' }}",
    "{{ 'x' if yes else 'y' if no else 'z' }}", "{{ 1 < 2 < 3 }} {{ 1 < 2 > 3 }} {{ 'a' in 'abc' }} {{ 5 not in numbers }}",
    "{{ 'b' in data }} {{ 'z' in data }} {{ 1 in (1, 2) }} {{ yes == 1 }} {{ 1 == 1.0 }} {{ '1' == 1 }} {{ nothing == missing }}",
    "{{ not yes }} {{ not missing }} {{ 0 or 'x' }} {{ 'a' and 'b' }} {{ none or [] }} {{ true and false }}",
    "{{ [1, 2] == [1, 2] }} {{ [1] == (1,) }} {{ {'a': 1} == {'a': 1} }} {{ 'a' < 'b' }} {{ 'B' < 'a' }}",
    # arithmetic
    "{{ 7 // 2 }} {{ -7 // 2 }} {{ 7 % 3 }} {{ -7 % 3 }} {{ 7 % -3 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 7 / 2 }} {{ 6 / 2 }}",
    "{{ 1 + 2 * 3 - 4 }} {{ (1 + 2) * 3 }} {{ -n }} {{ +n }} {{ - -n }} {{ 1.5 * 2 }} {{ 7.5 // 2 }} {{ -7.5 % 2 }} {{ yes + 1 }}",
    "{{ 'a' + 'b' ~ 1 ~ none }} {{ 'ab' * 3 }} {{ [1] * 2 + [3] }} {{ 3 * 'x' }} {{ 'x' * -1 }}|{{ 1 ~ 2 }} {{ '2' + 3 ~ 4 }}",
    "{{ -2 ** 2 }} {{ -3 | abs }} {{ 2 * 3 | string + '1' if no else 'k' }} {{ 10 - 2 - 3 }} {{ 2 ** 3 ** 2 }}",
    # loops
    "{% for w in words %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}{{ w }};{% endfor %}",
    "{% for w in words %}{{ loop.length }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.cycle('o', 'e') }},{% endfor %}",
    "{% for x in [] %}x{% else %}none{% endfor %}{% for x in missing %}x{% else %}none{% endfor %}",
    "{% for p in people if p.age is defined %}{{ loop.index }}{{ p.name }}{{ p['age'] }} {% endfor %}",
    "{% for k, v in data.items() %}{{ k }}={{ v }};{% endfor %}", "{% for k in data %}{{ k }}{% endfor %}{% for c in 'aé😀' %}{{ c }}.{% endfor %}",
    "{% for i in range(3) %}{% for j in range(1, 6, 2) %}{{ loop.index }}{{ i }}{{ j }} {% endfor %}{% endfor %}{{ range(5, 0, -2) | list }}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for a, b in [(1, 2), [3, 4]] %}{{ a + b }} {% endfor %}{% for i in [1, 2, 3][::-1] %}{{ i }}{% endfor %}",
    "{% for i in (1, 2) if i > 1 %}{{ i }}{% endfor %}{% for i in [3, 1] | sort %}{{ i }}{% endfor %}{{ words | sort }}{{ numbers | sort(reverse=true) }}{{ people | sort(attribute='name', reverse=true) | map(attribute='name') | list }}",
    # variables and scopes
    "{% set a = 1 %}{{ a }}{% set a, b = 2, 'x' %}{{ a }}{{ b }}{% set c %}<{{ name }}>{% endset %}{{ c }}{{ c | length }}",
    "{% set a = 1 %}{% for i in [1, 2] %}{% set a = i + 1 %}{{ a }}{% endfor %}{{ a }}", "{% if yes %}{% set a = 5 %}{% endif %}{{ a }}",
    "{% set ns = namespace(found=false, n=0) %}{% for i in numbers %}{% set ns.n = ns.n + i %}{% if i == 1 %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.n }}{{ ns.found }}{{ ns.other }}",
    "{% set loop_messages = messages[1:] %}{{ loop_messages | length }}{{ loop_messages[0].role }}", "{% set t = (1, 2) %}{{ t[0] }}{{ t.1 }}",
    "{% set x = 1 %}{% set y %}{% set x = 2 %}{{ x }}{% endset %}{{ x }}{{ y }}", "{% set d = dict(a=1, b='c') %}{{ d }}{{ {'a': 1, 'b': 'c'}['b'] }}",
    # items, attributes, slices
    "{{ people[0].name }}{{ people[-1]['name'] }}{{ people[0].missing }}|{{ numbers[9] }}|{{ nothing.foo }}|{{ data.b }}|{{ data['C'] }}",
    "{{ numbers[1:] }}{{ numbers[:-1] }}{{ numbers[::2] }}{{ numbers[::-1] }}{{ name[1:3] }}{{ name[::-1] }}{{ name[-3:] }}{{ 'äöü'[1] }}{{ name[10:] }}|{{ name[-100:2] }}|{{ numbers[2:0:-1] }}|{{ numbers[-1:-9:-1] }}",
    # string methods
    "{{ text.strip() }}|{{ text.lstrip() }}|{{ text.rstrip() }}|{{ 'xxaxx'.strip('x') }}|{{ '\u00a0 a\u2003'.strip() }}|",
    "{{ name.upper() }}{{ name.lower() }}{{ 'hello wORLD'.title() }}{{ 'hELLO'.capitalize() }}{{ 'äb'.upper() }}",
    "{{ name.startswith('Wo') }}{{ name.endswith(('x', 'ld')) }}{{ 'a,b,,c'.split(',') }}{{ ' a  b '.split() }}{{ 'a b c'.split(' ', 1) }}{{ 'a-b-c'.rsplit('-', 1) }}",
    "{{ 'a.b'.split('.')[-1] }}{{ 'aXbXc'.replace('X', '-') }}{{ 'aaa'.replace('a', 'b', 2) }}{{ 'abc'.find('c') }}{{ 'abc'.find('x') }}{{ 'éa'.find('a') }}{{ 'banana'.count('an') }}",
    "{{ ', '.join(words) }}{{ 'a\\nb\\r\\nc'.splitlines() }}{{ 'abc'.isdigit() }}{{ '123'.isdigit() }}{{ 'ab'.isalpha() }}{{ ' '.isspace() }}{{ 'prefix-x'.removeprefix('prefix-') }}{{ 'abc'.rfind('b') }}",
    "{{ '</think>x</think> y '.split('</think>')[-1].lstrip('\\n') }}|{{ 'abc'.replace('', '-') }}|{{ 'a b c '.split(none, 1) }}",
    # data methods
    "{{ data.keys() | list }}{{ data.values() | list }}{{ data.get('b') }}{{ data.get('q') }}{{ data.get('q', 3) }}{{ data | items | list }}{{ data | dictsort }}",
    # filters
    "{{ text | trim }}|{{ words | length }}{{ name | length }}{{ 'äö😀' | length }}{{ data | count }}{{ missing | length }}",
    "{{ name | upper }}{{ name | lower }}{{ 'ab cd' | title }}{{ 'ABC' | capitalize }}{{ 5 | string + 'x' }}",
    "{{ missing | default('d') }}{{ empty | default('d') }}{{ empty | default('d', true) }}{{ nothing | d('z', boolean=true) }}{{ missing | default }}|",
    "{{ words | join }}{{ words | join(', ') }}{{ people | join('/', attribute='name') }}{{ [1, none, 2.5] | join('-') }}",
    "{{ words | first }}{{ words | last }}{{ words | reverse | list }}{{ name | reverse }}{{ 'abc' | list }}{{ [] | first }}|",
    "{{ data | tojson }}|{{ words | tojson }}|{{ 'a/<b>&\\'\"' | tojson }}|{{ 1.0 | tojson }}{{ true | tojson }}{{ none | tojson }}",
    "{{ data | tojson(indent=2) }}|{{ [] | tojson(indent=4) }}|{{ [1, [2]] | tojson(indent=2) }}|{{ {} | tojson }}",
    "{{ '42' | int }}{{ '4.9' | int }}{{ 'x' | int }}{{ 'x' | int(7) }}{{ 3.9 | int }}{{ -3.9 | int }}{{ '2.5' | float }}{{ 3 | float }}{{ -5 | abs }}{{ 2.5 | abs }}",
    "{{ 'a\\nb\\n\\nc' | indent }}|{{ 'a\\nb' | indent(2, true) }}|{{ 'a\\n\\nb' | indent(1, blank=true) }}|{{ 'axbx' | replace('x', 'y') }}|{{ numbers | max }}{{ numbers | min }}",
    "{{ people | map(attribute='name') | join(',') }}{{ words | map('upper') | list }}{{ people | map(attribute='age', default=0) | list }}",
    "{{ people | selectattr('age') | map(attribute='name') | list }}{{ people | selectattr('name', 'equalto', 'Bob') | list | length }}{{ people | rejectattr('age', 'defined') | map(attribute='name') | list }}",
    "{{ numbers | select('odd') | list }}{{ numbers | reject('gt', 1) | list }}{{ [0, 1, ''] | select | list }}{{ messages | selectattr('role', 'in', ['user', 'tool']) | list | length }}",
    # tests
    "{{ name is defined }}{{ missing is defined }}{{ missing is not defined }}{{ missing is undefined }}{{ nothing is none }}{{ name is not none }}",
    "{{ name is string }}{{ n is number }}{{ n is integer }}{{ x is float }}{{ yes is boolean }}{{ yes is number }}{{ yes is integer }}{{ data is mapping }}{{ words is iterable }}{{ name is iterable }}{{ n is iterable }}{{ words is sequence }}{{ data is sequence }}{{ words is mapping }}",
    "{{ n is odd }}{{ n is even }}{{ n is divisibleby 7 }}{{ n is eq 7 }}{{ n is gt(3) }}{{ n is le 7 }}{{ 'a' is in words }}{{ yes is true }}{{ no is false }}{{ 1 is true }}{{ n is ne 3 and yes }}",
    "{{ not missing is defined }}{{ n is defined and n > 3 }}{{ words[0] is string }}{{ 'a' is in ['a'] and no }}",
    # macros
    "{% macro m(a, b='z', c=3) %}[{{ a }}{{ b }}{{ c }}]{% endmacro %}{{ m(1) }}{{ m(1, c=5) }}{{ m('x', 'y') | length }}{{ m() }}",
    "{% macro outer(items) %}{% for i in items %}{{ inner(i) }}{% endfor %}{% endmacro %}{% macro inner(i) %}<{{ i }}>{% endmacro %}{{ outer(words) }}",
    "{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}", "{% set g = 'global' %}{% macro m() %}{{ g }}{{ name }}{% endmacro %}{% for i in [1] %}{{ m() }}{% endfor %}",
    # time
    "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d %H:%M') }}",
    # chat templates in common shapes
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    # turns with roles that have to alternate, and a system text that joins the first turn
    """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set first = "" -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("roles must alternate") }}
    {%- endif -%}
    {%- set role = "model" if turn['role'] == 'assistant' else turn['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first if loop.first else "") }}
    {%- if turn['content'] is string -%}
        {{ turn['content'] | trim }}
    {%- elif turn['content'] is iterable -%}
        {%- for part in turn['content'] -%}
            {%- if part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("unknown content") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
""",
    # headers, a date, tools as JSON
    """{{- bos_token }}
{%- if not date is defined %}
    {%- if strftime_now is defined %}{%- set date = strftime_now("%d %b %Y") %}{%- else %}{%- set date = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Date: " + date + "\\n\\n" }}
{%- if tools is defined and tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
]
# Templates that fail here and there.
FAILING = ["{{ missing.x }}", "{{ 1 + 'a' }}", "{{ 'a' < 1 }}", "{% if %}", "{{ name", "{% for x in %}{% endfor %}", "{% endif %}",
           "{{ raise_exception('no') }}", "{% for x in 5 %}{% endfor %}", "{{ 1 / 0 }}", "{{ 'a'.nosuch() }}", "{{ name | nosuch }}",
           "{{ name is nosuch }}", "{% if yes %}a", "{{ 'a }}", "{{ [1, 2 }}", "{{ missing + 1 }}", "{{ name() }}", "{% set a.b = 1 %}", "{# open"]

WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Weather of a place: <now> & \"later\"",
    "parameters": {"type": "object", "properties": {
        "place": {"type": "string", "description": "Ort, z. B. Köln"}, "days": {"type": "integer", "default": 3}},
        "required": ["place"]}}}
CHATS = [
    {"messages": [{"role": "user", "content": "Hello"}]},
    {"messages": [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Why is the sky blue?"}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"},
                  {"role": "user", "content": "  Wie geht's? 😀\n"}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], "add_generation_prompt": False},
    {"messages": [{"role": "user", "content": "Weather in Köln?"}], "tools": [WEATHER]},
    {"messages": [
        {"role": "system", "content": "Use tools."}, {"role": "user", "content": "Weather in Köln and Bonn?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "get_weather", "arguments": {"place": "Köln", "days": 1.0}}},
            {"name": "get_weather", "arguments": {"place": "Bonn"}}]},
        {"role": "tool", "content": "12 °C"}, {"role": "tool", "content": "{\"t\": 13}"},
        {"role": "assistant", "content": "12 and 13 degrees."}, {"role": "user", "content": "Thanks"}],
     "tools": [WEATHER]},
]


def model_template(path):
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tokenizer"))
    import compare
    entries = compare.metadata(path)
    text = lambda key: entries[key][1][8:].decode()
    names, at, data = [], 12, entries["tokenizer.ggml.tokens"][1]
    while at < len(data):
        size = struct.unpack_from("<Q", data, at)[0]
        names.append(data[at + 8:at + 8 + size].decode())
        at += 8 + size
    token = lambda key: names[struct.unpack("<I", entries[f"tokenizer.ggml.{key}_token_id"][1])[0]]
    return text("tokenizer.chat_template"), token("bos"), token("eos")


def main():
    output, *paths = sys.argv[1:]
    env = environment()
    common = {"bos_token": "<bos>", "eos_token": "<eos>", "add_generation_prompt": True, "tools": None,
              "documents": None}
    golden = {"jinja2": jinja2.__version__, "now": NOW, "variables": VARIABLES, "chats": CHATS}
    golden["snippets"] = [{"template": s, "expected": env.from_string(s).render(**common, **VARIABLES)}
                          for s in SNIPPETS]
    golden["failing"] = []
    for template in FAILING:
        try:
            env.from_string(template).render(**common, **VARIABLES)
            sys.exit(f"this should fail: {template}")
        except (jinja2.exceptions.TemplateError, TypeError, ZeroDivisionError):
            golden["failing"].append(template)
    golden["models"] = {}
    for path in paths:
        template, bos, eos = model_template(path)
        golden["models"][pathlib.Path(path).name] = [
            env.from_string(template).render(**(common | {"bos_token": bos, "eos_token": eos} | chat))
            for chat in CHATS]
    pathlib.Path(output).write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
