"""The endpoint annotator against a real server on 127.0.0.1, and the policy annotator."""

import http.server
import json
import logging
import threading
import time
import traceback

import pytest

from trl_ext.annotate import AnnotatorError, EndpointAnnotator, PolicyAnnotator, Request, Span, chat_http

KEY = "sk-very-secret-0123456789"
VARIABLE = "TEST_ANNOTATOR_KEY"
ANSWER = '{"error_spans": [{"segment_ids": [0], "error_type": "sign_error"}]}'
SPAN = [Span((0,), "sign_error")]


def chat(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def request(name="p", segments=("one", "two")):
    return Request(name, segments, False, {})


class Server:
    """Answers call number n with `reply(n, body)` -> (status, text[, headers]) and records what it got."""

    def __init__(self):
        self.reply = lambda n, body: (200, chat(ANSWER))
        self.bodies, self.headers, self.paths = [], [], []
        self.active = self.peak = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                outer.handle(self)

            do_GET = do_POST

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def handle(self, handler):
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(json.loads(body or "{}"))
            self.headers.append(dict(handler.headers))
            self.paths.append(handler.path)
            self.active += 1
            self.peak = max(self.peak, self.active)
        try:
            status, text, *extra = self.reply(number, self.bodies[number])
            data = text if isinstance(text, bytes) else text.encode()
            handler.send_response(status)
            for name, value in (extra[0] if extra else {}).items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:  # the client gave up, which some tests want
            pass
        finally:
            with self.lock:
                self.active -= 1

    def close(self):
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv(VARIABLE, KEY)
    server = Server()
    yield server
    server.close()


def annotator(server, **settings):
    defaults = {"model": "m", "api_key_env": VARIABLE, "timeout": 5.0, "retries": 2, "backoff": 0.01}
    return EndpointAnnotator(server.url, **(defaults | settings))


def test_success_sends_what_the_settings_say(server):
    annotate = annotator(server, max_tokens=77, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert annotate([request()]) == [SPAN]
    (body,) = server.bodies
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "m" and body["temperature"] == 0 and body["max_tokens"] == 77
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "[0] one" in body["messages"][0]["content"]
    counts = {name: value for name, value in annotate.stats.items() if name != "seconds"}
    assert counts == {"requests": 1, "cache_hits": 0, "failures": 0, "parse_failures": 0}
    assert annotate.stats["seconds"] > 0


def test_answers_stay_with_their_requests(server):
    def reply(n, body):
        index = int(body["messages"][0]["content"].split("problem ")[1].split("\n")[0])
        time.sleep(0.02 * (4 - index % 5))
        return 200, chat(ANSWER.replace("[0]", f"[{index}]"))

    server.reply = reply
    segments = tuple("abcdefghij")
    found = annotator(server)([request(f"problem {i}", segments) for i in range(10)])
    assert [spans[0].segment_ids for spans in found] == [(i,) for i in range(10)]


def test_no_key_is_sent_when_none_is_named(server):
    assert annotator(server, api_key_env=None)([request()]) == [SPAN]
    assert "Authorization" not in server.headers[0]


def test_requests_without_segments_are_not_sent(server):
    assert annotator(server)([request(segments=())]) == [[]]
    assert annotator(server)([]) == []
    assert server.bodies == []


def test_equal_requests_of_a_batch_are_sent_once(server):
    annotate = annotator(server)
    assert annotate([request()] * 5 + [request("other")]) == [SPAN] * 6
    assert len(server.bodies) == 2 and annotate.stats["requests"] == 6


def test_a_cached_answer_needs_no_second_request(server, tmp_path):
    first = annotator(server, cache_dir=tmp_path)
    assert first([request("a"), request("b")]) == [SPAN, SPAN]
    second = annotator(server, cache_dir=tmp_path)
    assert second([request("a"), request("b")]) == [SPAN, SPAN]
    assert len(server.bodies) == 2
    assert (first.stats["cache_hits"], second.stats["cache_hits"]) == (0, 2)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2 and all(path.parent.name == path.name[:2] for path in files)


@pytest.mark.parametrize("change", [{"model": "m2"}, {"max_tokens": 9}, {"extra_body": {"seed": 1}}])
def test_the_cache_knows_model_and_parameters(server, tmp_path, change):
    annotator(server, cache_dir=tmp_path)([request()])
    annotator(server, cache_dir=tmp_path, **change)([request()])
    assert len(server.bodies) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"text": 3}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_cache_entry_is_replaced(server, tmp_path, damage):
    annotator(server, cache_dir=tmp_path)([request()])
    (entry,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    good = entry.read_bytes()
    entry.write_bytes(damage)
    assert annotator(server, cache_dir=tmp_path)([request()]) == [SPAN]
    assert len(server.bodies) == 2 and entry.read_bytes() == good


def test_an_empty_answer_is_a_parse_failure_and_is_not_cached(server, tmp_path):
    server.reply = lambda n, body: (200, chat(None if n == 0 else ANSWER))
    annotate = annotator(server, cache_dir=tmp_path)
    assert annotate([request()]) == [[]]
    assert annotate.stats["parse_failures"] == 1 and annotate.stats["failures"] == 0
    assert annotate([request()]) == [SPAN]


def test_requests_run_in_parallel_up_to_the_limit(server):
    arrived = threading.Barrier(4)

    def reply(n, body):
        arrived.wait(timeout=5)  # breaks unless four requests are here together
        return 200, chat(ANSWER)

    server.reply = reply
    assert annotator(server, concurrency=4, retries=0)([request(str(i)) for i in range(12)]) == [SPAN] * 12
    assert server.peak == 4


def test_timeout_then_success(server):
    def reply(n, body):
        if n == 0:
            server.closing.wait(3)
        return 200, chat(ANSWER)

    server.reply = reply
    annotate = annotator(server, timeout=0.3)
    assert annotate([request()]) == [SPAN]
    assert len(server.bodies) == 2 and annotate.stats["failures"] == 0 and annotate.stats["seconds"] < 2


def test_a_reply_that_drips_is_cut_off(server):
    class Drip:
        def read1(self, size):
            time.sleep(0.01)
            return b"x"

    with pytest.raises(chat_http.TransientError, match="time-out"):
        chat_http._read(Drip(), time.monotonic() + 0.1)


def test_server_errors_then_success(server):
    server.reply = lambda n, body: (500, "oops") if n < 2 else (200, chat(ANSWER))
    assert annotator(server)([request()]) == [SPAN]
    assert len(server.bodies) == 3


def test_a_request_that_keeps_failing_gives_no_spans(server):
    server.reply = lambda n, body: (503, "busy") if "bad" in body["messages"][0]["content"] else (200, chat(ANSWER))
    annotate = annotator(server)
    assert annotate([request("good"), request("bad problem"), request("fine")]) == [SPAN, [], SPAN]
    assert annotate.stats["failures"] == 1 and annotate.stats["parse_failures"] == 0
    assert len(server.bodies) == 2 + 3


def test_a_batch_without_any_answer_raises(server):
    server.reply = lambda n, body: (500, "down for repair")
    with pytest.raises(AnnotatorError, match=r"all 2 requests .*status 500: down for repair(.|\n)*Check") as caught:
        annotator(server)([request("a"), request("b")])
    assert server.url in str(caught.value)


def test_nobody_listening_raises():
    closed = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    closed.server_close()
    dead = EndpointAnnotator(f"http://127.0.0.1:{closed.server_port}", "m", retries=1, backoff=0.01)
    with pytest.raises(AnnotatorError, match="refused"):
        dead([request()])


def test_a_dead_server_is_not_asked_for_the_whole_batch(server):
    server.reply = lambda n, body: (500, "down")
    with pytest.raises(AnnotatorError, match="all 100 requests"):
        annotator(server, concurrency=2, retries=0)([request(str(i)) for i in range(100)])
    assert 4 <= len(server.bodies) <= 6  # two rounds of two threads, and what was under way


def test_a_server_that_answers_now_and_then_is_asked_for_the_whole_batch(server):
    server.reply = lambda n, body: (200, chat(ANSWER)) if n % 20 == 0 else (500, "")
    annotate = annotator(server, concurrency=1, retries=0)
    assert annotate([request(str(i)) for i in range(41)]).count(SPAN) == 3
    assert len(server.bodies) == 41 and annotate.stats["failures"] == 38


def test_429_honours_retry_after_up_to_a_bound(server, monkeypatch):
    monkeypatch.setattr(chat_http, "MAX_RETRY_AFTER", 0.4)
    server.reply = lambda n, body: (429, "slow down", {"Retry-After": "9" * 3000}) if n == 0 else (200, chat(ANSWER))
    annotate = annotator(server, backoff=0.0)
    assert annotate([request()]) == [SPAN]
    assert 0.4 <= annotate.stats["seconds"] < 3


@pytest.mark.parametrize("value", ["-5", "nan", "Wed, 21 Oct 2999 07:28:00 GMT", "²", ""])
def test_other_retry_after_values_use_the_own_back_off(server, value):
    server.reply = lambda n, body: (
        (429, "slow", {"Retry-After": value.encode("latin-1").decode("latin-1")}) if n == 0 else (200, chat(ANSWER))
    )
    annotate = annotator(server)
    assert annotate([request()]) == [SPAN]
    assert annotate.stats["seconds"] < 3


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_costs_its_own_span_only(server, status):
    """One rollout over the context length must not end a run; a setting that is wrong for all must."""
    server.reply = lambda n, body: (
        (status, "refused") if "problem x" in body["messages"][0]["content"] else (200, chat(ANSWER))
    )
    asking = annotator(server, retries=0)
    assert asking([request("problem x"), request("problem y")]) == [[], SPAN]
    assert asking.stats["failures"] == 1
    with pytest.raises(AnnotatorError, match=f"status {status}.*extra_body"):
        asking([request("problem x1"), request("problem x2")])


@pytest.mark.parametrize(("status", "advice"), [(401, "api_key_env"), (404, "base_url"), (418, "model")])
def test_other_4xx_stop_at_once(server, status, advice):
    def reply(n, body):
        if "problem 0" in body["messages"][0]["content"]:
            server.closing.wait(0.5)
            return 503, "", {"Retry-After": "30"}  # its long wait must not hold the error back
        return status, "wrong " + "x" * 1000

    server.reply = reply
    start = time.perf_counter()
    with pytest.raises(AnnotatorError) as caught:
        annotator(server, concurrency=2)([request(f"problem {i}") for i in range(50)])
    text = str(caught.value)
    assert server.url in text and f"status {status}" in text and advice in text
    assert "x" * 150 in text and "x" * 200 not in text
    assert time.perf_counter() - start < 5 and len(server.bodies) < 10


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(server, status):
    other = Server()
    server.reply = lambda n, body: (status, "", {"Location": other.url + "/chat/completions"})
    try:
        with pytest.raises(AnnotatorError, match="redirects"):
            annotator(server)([request()])
        assert other.bodies == [] and len(server.bodies) == 1
    finally:
        other.close()


@pytest.mark.parametrize(
    "text",
    [
        "rubbish", "", "null", "[]", "{}", '{"choices": []}', '{"choices": [{"message": {}}]}', "[" * 100_000,
        '{"choices": [{"message": {"content": 5}}]}', '{"error": "quota"}', b"\xff\xfe\x00", "9" * 10_000,
    ],
)  # fmt: skip
def test_a_rubbish_reply_is_tried_again(server, text):
    server.reply = lambda n, body: (200, text) if n == 0 else (200, chat(ANSWER))
    annotate = annotator(server)
    assert annotate([request()]) == [SPAN]
    assert len(server.bodies) == 2


def test_a_huge_reply_is_not_read(server):
    server.reply = lambda n, body: (200, chat(ANSWER + " " * chat_http.MAX_RESPONSE_BYTES))
    with pytest.raises(AnnotatorError, match="larger than"):
        annotator(server, retries=0)([request()])


def test_an_answer_that_does_not_parse_is_counted(server):
    server.reply = lambda n, body: (200, chat("I think it is fine."))
    annotate = annotator(server)
    assert annotate([request()]) == [[]]
    assert annotate.stats["parse_failures"] == 1


@pytest.mark.parametrize(
    "reply",
    [
        (401, f"invalid key {KEY}"), (500, KEY * 20), (200, f"no json {KEY}"), (418, "x" * 190 + KEY),
        (200, chat(ANSWER + f" Bearer {KEY}")), (307, KEY, {"Location": f"/{KEY}"}),
    ],
)  # fmt: skip
def test_the_key_shows_up_nowhere(server, tmp_path, caplog, capfd, reply):
    caplog.set_level(logging.DEBUG)
    server.reply = lambda n, body: reply
    annotate = annotator(server, cache_dir=tmp_path)
    shown = [repr(annotate), str(vars(annotate))]
    try:
        shown += [repr(annotate([request()]))]
        assert any(tmp_path.rglob("*.json"))
    except AnnotatorError as error:
        shown += ["".join(traceback.format_exception(error)), repr(error)]
    shown += [caplog.text, *capfd.readouterr(), repr(annotate)]
    shown += [str(path) + path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY[:12] not in "\n".join(shown)


@pytest.mark.parametrize(
    ("value", "match"),
    [("", "not set"), ("two words secret", "characters"), ("secret\nX: y", "characters"), ("sécret", "characters")],
)
def test_an_unusable_key_is_refused_without_showing_it(server, monkeypatch, value, match):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(AnnotatorError, match=f"{VARIABLE}.*{match}") as caught:
        annotator(server)([request()])
    assert "cret" not in "".join(traceback.format_exception(caught.value)).replace("very-secret", "")
    assert server.bodies == []


def test_a_short_placeholder_key_does_not_damage_answers(server, monkeypatch):
    monkeypatch.setenv(VARIABLE, "0")
    assert annotator(server)([request()]) == [SPAN]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"base_url": "ftp://h/v1"}, "base_url"),
        ({"base_url": f"https://user:{KEY}@h/v1"}, "base_url"),
        ({"base_url": f"https://h/v1?key={KEY}"}, "base_url"),
        ({"base_url": "https://h/v1/chat/completions"}, "before /chat/completions"),
        ({"base_url": "http://h/vé"}, "base_url"),
        ({"api_key_env": KEY}, "NAME"),
        ({"timeout": 0}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"concurrency": 0}, "concurrency"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"backoff": -1}, "backoff"),
        ({"extra_body": {"stream": True}}, "stream"),
    ],
)
def test_bad_settings_are_refused_without_showing_secrets(settings, match):
    with pytest.raises(ValueError, match=match) as caught:
        EndpointAnnotator(**({"base_url": "https://h/v1", "model": "m"} | settings))
    assert KEY not in str(caught.value)


def test_all_bad_settings_are_named_at_once():
    with pytest.raises(ValueError, match=r"timeout.*retries"):
        EndpointAnnotator("https://h/v1", "m", timeout=-1, retries=-1)


def test_policy_annotates_the_whole_batch_in_one_call():
    calls = []

    def generate(conversations):
        calls.append(conversations)
        return [ANSWER, "not json"]

    annotate = PolicyAnnotator(generate)
    assert annotate([request("a"), request("b", ()), request("c")]) == [SPAN, [], []]
    assert len(calls) == 1 and [len(c) for c in calls[0]] == [1, 1]
    assert "Problem:\nc" in calls[0][1][0]["content"]
    assert (annotate.stats["requests"], annotate.stats["parse_failures"]) == (2, 1)
    assert annotate([request(segments=())]) == [[]] and len(calls) == 1


def test_policy_with_a_wrong_number_of_answers_is_refused():
    with pytest.raises(ValueError, match="2 conversations but 1 answers"):
        PolicyAnnotator(lambda conversations: [ANSWER])([request("a"), request("b")])
