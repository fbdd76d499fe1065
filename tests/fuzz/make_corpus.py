#!/usr/bin/env python3
"""Writes small valid inputs that the fuzzers start from.

Usage: make_corpus.py FOLDER     one folder below it for each fuzz target
"""
import json
import math
import pathlib
import struct
import sys


def gguf_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf(tensors: list[tuple[str, int, tuple[int, ...], int]], version: int = 3) -> bytes:
    """A GGUF file with some metadata of each kind; a tensor is (name, type, dims, bytes)."""
    metadata = [
        ("general.architecture", 8, gguf_string("llama")),
        ("general.alignment", 4, struct.pack("<I", 32)),
        ("llama.block_count", 4, struct.pack("<I", 2)),
        ("llama.rope.freq_base", 6, struct.pack("<f", 10000.0)),
        ("tokenizer.ggml.add_bos_token", 7, b"\x01"),
        ("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 3) + b"".join(map(gguf_string, ["a", "b", "ab"]))),
        ("tokenizer.ggml.token_type", 9, struct.pack("<IQ3i", 5, 3, 1, 1, 1)),
        ("tokenizer.ggml.scores", 9, struct.pack("<IQ3f", 6, 3, 0.0, -1.0, -2.0)),
    ]
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, kind, value in metadata:
        header += gguf_string(key) + struct.pack("<I", kind) + value
    offset = 0
    for name, kind, dims, size in tensors:
        header += gguf_string(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
        header += struct.pack("<IQ", kind, offset)
        offset += (size + 31) // 32 * 32
    header += b"\0" * (-len(header) % 32)
    return header + bytes(i * 37 % 256 for i in range(offset))


def logits(ctx: int, vocab: int, chunks: int) -> bytes:
    """A logits file of llama.cpp's perplexity tool with plausible rows."""
    tokens = struct.pack(f"<{ctx * chunks}i", *(i % vocab for i in range(ctx * chunks)))
    codes = struct.pack(f"<{vocab + vocab % 2}H", *(i * 97 % 65536 for i in range(vocab + vocab % 2)))
    row = struct.pack("<ff", 16 / 65535, -17.0) + codes
    return b"_logits_" + struct.pack("<3i", ctx, vocab, chunks) + tokens + row * (ctx - 1 - ctx // 2) * chunks


def plan(tensors: dict[str, list[int]]) -> bytes:
    """A plan file with the given tensors, all values 0.5."""
    header: dict = {"__metadata__": {"kvant_plan_version": "1", "geometry_id": "g", "weights_id": "w",
                                     "corpus_sha256": "c", "kv": "nvfp4+bias"}}
    end = 0
    for name, shape in tensors.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + struct.pack("<f", 0.5) * (end // 4)


TEMPLATES = [
    "{% for m in messages if m.role is defined %}{{ loop.index }}{{ m['role'] + m.content | trim }}{% else %}x{% endfor %}",
    "{%- if not n > 5 and x in 'text' %}a{% elif x %}{{ n // 2 ** 2 % 3 - 1.5 }}{% else %}{{ none ~ true }}{% endif -%} b",
    "{% set ns = namespace(a=[1, 2]) %}{% set ns.a = ns.a + [(1, 'b')] %}{{ ns.a[::-1] | tojson(indent=2) }}{% set t %}q{% endset %}",
    "{% macro f(a, b=2) %}{{ a }}{{ f(a - 1) if a > 0 }}{% endmacro %}{{ f(n) | replace('1', x) | upper }}{# c #}",
    "{% raw %}{{ }}{% endraw %}{{ {'a': x.split('e', 1), 'b': 'q'.join(['1', '2'])}.items() | list | reverse | first | length }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | sort | dictsort }}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% break %}{% endfor %}{{ strftime_now('%Y') }}{{ raise_exception('x') }}",
]


CONFIG = """{"model_type": "MODEL", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "vocab_size": 100, "rms_norm_eps": 1e-5,
"max_position_embeddings": 512, "rope_theta": 10000, "sliding_window": 64, "num_experts": 4, "num_experts_per_tok": 2,
"moe_intermediate_size": 32, "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
"high_freq_factor": 4, "original_max_position_embeddings": 128}}"""


def eval_state() -> bytes:
    """A state of `kvant eval --resume` with two chunks and a layer, of the evaluation in eval_state_fuzz.cc."""
    scores = {"nll": [1.5, 2.25, 3.0], "delta_nll": [-0.5, 0.0, 1e-9], "kl": [0.25, 1e-20, 0.0], "same_top": "101"}
    lines = [{"kvant_eval_state": 1, "evaluation": {"ctx": 8}}]
    lines += [{"chunk": chunk, "bits_per_value": [16.0, 4.75], "scores": [scores, scores]} for chunk in range(2)]
    lines.append({"layer": 5, "format": 1, "kl_mean": 0.001, "delta_nll": -0.25})
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


SCHEMAS = [
    {"type": "object", "properties": {"a": {"type": "string", "maxLength": 9}, "b": {"type": ["integer", "null"]}},
     "required": ["b"], "additionalProperties": {"type": "number", "minimum": -0.5, "exclusiveMaximum": 12.25}},
    {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}, "minItems": 1, "maxItems": 20}},
     "anyOf": [{"$ref": "#/$defs/t"}, {"enum": ["a", 1, None, {"b": [2]}]}]},
    {"allOf": [{"type": "object", "properties": {"a": {}}}, {"required": ["a"]}], "oneOf": [
        {"properties": {"a": {"const": 1}}, "required": ["a"], "type": "object"},
        {"properties": {"a": {"const": 2}}, "required": ["a"], "type": "object"}]},
    {"type": "array", "prefixItems": [{"type": "string", "format": "date-time"}, {"pattern": "^[a-c]+$"}],
     "items": {"type": "object", "maxProperties": 2, "minProperties": 1}},
]
COMPLETION = {
    "prompt": "a", "model": "m", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": -3,
    "stop": ["x", "y"], "stop_token_ids": [4], "ignore_eos": True, "min_tokens": 2, "n": 2, "logit_bias": {"5": -100},
    "logprobs": 2, "echo": True, "stream": True, "stream_options": {"include_usage": True}, "cache_salt": "s",
    "return_token_ids": True, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}}
CHAT = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]},
                 {"role": "assistant", "content": None, "tool_calls": [
                     {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
                 {"role": "tool", "tool_call_id": "c", "content": "2"}],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}}, "logprobs": True, "top_logprobs": 3,
    "max_completion_tokens": 5, "structured_outputs": {"choice": ["a", "b"]}, "chat_template_kwargs": {"x": 1}}


def main() -> None:
    root = pathlib.Path(sys.argv[1])
    files = {
        "config_json/llama": CONFIG.replace("MODEL", "llama").encode(),
        "config_json/gemma3": CONFIG.replace("MODEL", "gemma3_text").encode(),
        "config_json/qwen3_moe": CONFIG.replace("MODEL", "qwen3_moe").encode(),
        "eval_state/whole": eval_state(),
        "eval_state/cut": eval_state()[:-9],
        "gguf/f32": gguf([("token_embd.weight", 0, (8, 3), 96), ("norm.weight", 0, (8,), 32)]),
        "gguf/q8_0": gguf([("blk.0.attn_q.weight", 8, (32, 2), 68)]),
        "gguf/q4_k": gguf([("blk.0.ffn_up.weight", 12, (256, 1), 144)]),
        "gguf/version2": gguf([("norm.weight", 0, (8,), 32)], version=2),
        "http/get": b"GET /a?x=%20y HTTP/1.1\r\nHost: h\r\nX: abc\r\n\r\n",
        "http/two": b"POST /s?q HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.0\r\n\r\n",
        "http/chunks": b"POST /s HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\nT: x\r\n\r\n",
        "http/expect": b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx",
        "openai_request/completion": b"\0" + json.dumps(COMPLETION).encode(),
        "openai_request/ids": b"\0" + json.dumps({"prompt": [[1, 2], [3]], "max_tokens": 0, "echo": True}).encode(),
        "openai_request/chat": b"\1" + json.dumps(CHAT).encode(),
        "option_file/all": b"# c\nport: 9000\nserved_model_name: [a, 'b']\nno-access-log: true\n",
        "option_file/anchor": b"port: &p 1\nserved-model-name: [*p, \"\\x41\"]\n",
        "sse/text": b"\x07\x03the text ends here, or there \xe2\x82\xac",
        "kv_events_config/all": b'{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:5557","hwm":9,'
                                b'"replay_endpoint":"tcp://*:5558","buffer_steps":1,"topic":"kv@{address}@{model}"}',
        "kv_events_config/endpoint": b"tcp://*:5557",
        "logits_file/even": logits(8, 6, 2),
        "logits_file/odd": logits(5, 7, 1),
        "plan/empty": plan({}),
        "plan/scales": plan({"layers.0.k.global_scale": [1], "layers.0.v.global_scale": [2]}),
        "plan/all": plan({"layers.0.k.bias": [2, 16], "layers.0.k.smooth": [2, 16], "layers.0.v.bias": [2, 16]}),
        "spec/preset": b"4bit,8bit+recent128",
        "spec/sides": b"bf16,k=int4:channel+mean,v=nvfp4+46+sink",
        "spec/options": b"fp8:head+mean+rot+smooth+prerope,k=int8+bias,v=fp8e5m2+rot+strict",
    }
    for i, text in enumerate([b"Hello, the <s>world</s>  123\n\n\n", "Grüße 😀 字 ".encode(), b"\xe2 \x96\xff<|im_end|>'ll"]):
        for choice in range(7):  # which tokenizer of tokenizer_fuzz.cc
            files[f"tokenizer/{i}-{choice}"] = bytes([choice]) + text
    for i, template in enumerate(TEMPLATES):
        files[f"jinja/{i}"] = template.encode()
    call = '{"name": "f", "%s": {"a": "}\\\\\\"", "b": [1, {}]}}'
    files["tool_calls/hermes"] = f"\0\3Well. <tool_call>\n{call % 'arguments'}\n</tool_call>\n".encode()
    files["tool_calls/json"] = f"\1\2{call % 'parameters'}; {call % 'arguments'}".encode()
    for i, schema in enumerate(SCHEMAS):
        files[f"grammar/schema-{i}"] = b"\1" + json.dumps(schema).encode() + b"\0" + bytes(range(40))
    for i, regex in enumerate([r"(a|b{2,9})*[^c-e]?\d+", r"^\w{3}(?:x|\u00e9)$|.*", r"(a?){3}\x41"]):
        files[f"grammar/regex-{i}"] = b"\0" + regex.encode() + b"\0" + bytes(range(40))
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    main()
