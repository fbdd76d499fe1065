#!/usr/bin/env python3
"""Uses `kvant serve` as its users do: with the `openai` Python package.

Usage: openai_suite.py KVANT MODEL [TEST...]     starts the server itself, on a free port

Exits with 77 (skipped) if the package or the model is not there.
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.request

try:
    import openai
except ImportError:
    print("skipped: the Python package openai is not installed")
    sys.exit(77)


class Server:
    """`kvant serve` with some options; its stderr is kept in `log`."""

    def __init__(self, *options: str) -> None:
        self.log: list[str] = []
        self.process = subprocess.Popen([KVANT, "serve", MODEL, "--port", "0", "--json", *options],
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True)
        self.reader.start()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the server did not start: " + "".join(self.log))
        self.ready = json.loads(line)
        self.url = self.ready["url"]

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=120)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.read().decode()

    def load(self) -> int:
        return json.loads(self.get("/load"))["server_load"]

    def stop(self) -> int:
        self.process.terminate()  # a second signal would end it at once
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(timeout=60)
        self.reader.join()
        self.process.stdout.close()
        self.process.stderr.close()
        return code


QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


class OpenAiSuite(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.server = Server("--max-model-len", "2048", "--max-num-seqs", "4")
        cls.client = cls.server.client()
        cls.model = cls.client.models.list().data[0].id

    @classmethod
    def tearDownClass(cls) -> None:
        code = cls.server.stop()
        assert code == 0, f"exit code {code}: " + "".join(cls.server.log)

    def test_models(self) -> None:
        self.assertEqual(self.client.models.retrieve(self.model).id, self.model)
        with self.assertRaises(openai.NotFoundError):
            self.client.models.retrieve("other")

    def test_chat(self) -> None:
        answer = self.client.chat.completions.create(model=self.model, messages=QUESTION, temperature=0, max_tokens=20)
        self.assertIn("Paris", answer.choices[0].message.content)
        self.assertEqual(answer.choices[0].message.role, "assistant")
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        self.assertGreater(answer.usage.prompt_tokens, 10)
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)

    def test_stream_says_the_same(self) -> None:
        whole = self.client.chat.completions.create(model=self.model, messages=QUESTION, temperature=0, max_tokens=20)
        text, reasons, usage = "", [], None
        for chunk in self.client.chat.completions.create(model=self.model, messages=QUESTION, temperature=0,
                                                         max_tokens=20, stream=True,
                                                         stream_options={"include_usage": True}):
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
                reasons.append(chunk.choices[0].finish_reason)
                self.assertIsNone(chunk.usage)
            else:
                usage = chunk.usage
        self.assertEqual(text, whole.choices[0].message.content)
        self.assertEqual([reason for reason in reasons if reason], ["stop"])
        self.assertEqual(reasons[-1], "stop")
        self.assertEqual(usage.completion_tokens, whole.usage.completion_tokens)

    def test_shared_prefix_is_cached(self) -> None:
        system = {"role": "system", "content": "You answer briefly. " * 60}
        for expect_hit in (False, True):
            answer = self.client.chat.completions.create(model=self.model, messages=[system] + QUESTION, max_tokens=1)
            cached = answer.usage.prompt_tokens_details.cached_tokens
            self.assertEqual(cached > 200, expect_hit, cached)

    def test_completions(self) -> None:
        answer = self.client.completions.create(model=self.model, prompt=["def fibonacci(n):\n", "1, 2, 3,"],
                                                temperature=0, max_tokens=12, n=1)
        self.assertEqual([choice.index for choice in answer.choices], [0, 1])
        self.assertIn("4", answer.choices[1].text)
        self.assertEqual(answer.usage.completion_tokens, 24)
        stopped = self.client.completions.create(model=self.model, prompt="1, 2, 3,", temperature=0, max_tokens=40,
                                                 stop=["6"])
        self.assertNotIn("6", stopped.choices[0].text)
        self.assertEqual(stopped.choices[0].finish_reason, "stop")

    def test_choices_and_seeds(self) -> None:
        def texts(seed: int) -> list[str]:
            answer = self.client.completions.create(model=self.model, prompt="Once upon a time", n=3, seed=seed,
                                                    max_tokens=16, temperature=1.0, extra_body={"ignore_eos": True})
            return [choice.text for choice in answer.choices]
        first = texts(7)
        self.assertEqual(len(set(first)), 3)
        self.assertEqual(texts(7), first)
        self.assertNotEqual(texts(8), first)

    def test_chat_logprobs(self) -> None:
        answer = self.client.chat.completions.create(model=self.model, messages=QUESTION, temperature=0, max_tokens=4,
                                                     logprobs=True, top_logprobs=3)
        tokens = answer.choices[0].logprobs.content
        self.assertGreaterEqual(len(tokens), 1)
        for token in tokens:
            self.assertEqual(len(token.top_logprobs), 3)
            self.assertEqual(token.top_logprobs[0].token, token.token)  # greedy
            self.assertLessEqual(token.logprob, 0)

    def test_echo_scores_the_prompt(self) -> None:
        def score(text: str) -> float:
            answer = self.client.completions.create(model=self.model, prompt=text, max_tokens=1, echo=True, logprobs=1,
                                                    temperature=0)
            self.assertTrue(answer.choices[0].text.startswith(text))
            logprobs = answer.choices[0].logprobs
            self.assertIsNone(logprobs.token_logprobs[0])
            self.assertEqual(len(logprobs.tokens), len(logprobs.text_offset))
            return sum(logprobs.token_logprobs[1:-1])
        self.assertGreater(score("The capital of France is Paris"), score("The capital of France is purple"))

    def test_json_schema(self) -> None:
        schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20},
                                                   "population": {"type": "integer", "minimum": 0}},
                  "required": ["city", "population"], "additionalProperties": False}
        answer = self.client.chat.completions.create(
            model=self.model, messages=QUESTION, max_tokens=100, seed=1,
            response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}})
        value = json.loads(answer.choices[0].message.content)
        self.assertEqual(list(value), ["city", "population"])
        self.assertIsInstance(value["population"], int)
        anything = self.client.chat.completions.create(model=self.model, messages=QUESTION, max_tokens=200,
                                                       temperature=0, response_format={"type": "json_object"})
        if anything.choices[0].finish_reason == "stop":
            self.assertIsInstance(json.loads(anything.choices[0].message.content), dict)

    def test_tools(self) -> None:
        tools = [{"type": "function", "function": {
            "name": name, "description": text, "parameters": {
                "type": "object", "properties": {"city": {"type": "string", "maxLength": 30}}, "required": ["city"]}}}
            for name, text in (("weather", "Weather of a city"), ("population", "Number of people"))]
        messages = [{"role": "user", "content": "How is the weather in Paris?"}]
        fields = {"model": self.model, "messages": messages, "tools": tools, "temperature": 0, "max_tokens": 200,
                  "parallel_tool_calls": False}
        answer = self.client.chat.completions.create(tool_choice="required", **fields)
        self.assertEqual(answer.choices[0].finish_reason, "tool_calls")
        call = answer.choices[0].message.tool_calls[0]
        self.assertIn(call.function.name, ("weather", "population"))
        self.assertIsInstance(json.loads(call.function.arguments)["city"], str)
        messages += [answer.choices[0].message.model_dump(exclude_none=True),
                     {"role": "tool", "tool_call_id": call.id, "content": "21 degrees, sunny"}]
        self.assertTrue(self.client.chat.completions.create(**{**fields, "messages": messages, "tool_choice": "none"})
                        .choices[0].message.content)

        named = {"type": "function", "function": {"name": "population"}}
        name, arguments = "", ""
        for chunk in self.client.chat.completions.create(tool_choice=named, stream=True,
                                                         **{**fields, "messages": messages[:1]}):
            for part in chunk.choices[0].delta.tool_calls or []:
                name += part.function.name or ""
                arguments += part.function.arguments or ""
        self.assertEqual(name, "population")
        self.assertIsInstance(json.loads(arguments)["city"], str)

    def test_token_ids_in_and_out(self) -> None:
        ids = json.loads(urllib.request.urlopen(urllib.request.Request(
            self.server.url + "/tokenize", json.dumps({"prompt": "1, 2, 3,"}).encode(),
            {"Content-Type": "application/json"}), timeout=30).read())["tokens"]
        answer = self.client.completions.create(model=self.model, prompt=ids, max_tokens=4, temperature=0,
                                                extra_body={"return_token_ids": True})
        self.assertEqual(answer.choices[0].model_extra["prompt_token_ids"], ids)
        self.assertEqual(len(answer.choices[0].model_extra["token_ids"]), 4)

    def test_errors(self) -> None:
        cases = [(openai.BadRequestError, {"messages": []}), (openai.BadRequestError, {"temperature": -1}),
                 (openai.BadRequestError, {"max_tokens": 1_000_000}), (openai.NotFoundError, {"model": "other"})]
        for kind, fields in cases:
            with self.assertRaises(kind) as raised:
                self.client.chat.completions.create(**{"model": self.model, "messages": QUESTION, **fields})
            self.assertIn("message", raised.exception.body)

    def test_abort_frees_the_request(self) -> None:
        stream = self.client.completions.create(model=self.model, prompt="Once upon a time", max_tokens=1900,
                                                stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        self.assertEqual(self.server.load(), 1)
        stream.close()
        for _ in range(100):
            if self.server.load() == 0:
                return
            time.sleep(0.05)
        self.fail("the request went on without its client")


class Keys(unittest.TestCase):
    def test_keys(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "keys"
            path.write_text("sk-one alice pepper\n")
            server = Server("--max-model-len", "512", "--api-key-file", str(path), "--served-model-name", "small")
            try:
                with self.assertRaises(openai.AuthenticationError):
                    server.client("sk-two").models.list()
                client = server.client("sk-one")
                self.assertEqual(client.models.list().data[0].id, "small")
                answer = client.chat.completions.create(model="small", messages=QUESTION, max_tokens=2)
                self.assertEqual(answer.usage.completion_tokens, 2)
            finally:
                self.assertEqual(server.stop(), 0)
            self.assertTrue(any("key=alice" in line for line in server.log), server.log)

    def test_drain(self) -> None:
        server = Server("--max-model-len", "2048")
        stream = server.client().completions.create(model=server.ready["models"][0], prompt="Once upon a time",
                                                    max_tokens=60, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        server.process.terminate()
        self.assertEqual([chunk.choices[0].finish_reason for chunk in stream][-1], "length")
        self.assertEqual(server.wait(), 0)


if __name__ == "__main__":
    KVANT, MODEL = sys.argv[1], sys.argv[2]
    if not os.path.exists(MODEL):
        print(f"skipped: there is no {MODEL}; scripts/fetch_model.sh smollm2 gets it")
        sys.exit(77)
    unittest.main(argv=sys.argv[:1] + sys.argv[3:])
