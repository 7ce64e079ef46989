"""Synthetic rows: the rules, the filters, the sandbox's templates, replies of an endpoint, and what is kept on disk."""

from __future__ import annotations

import json
import random
import re

import pytest

from evals.contamination import Index
from trl_ext.annotate import endpoint
from trl_ext.annotate.base import AnnotatorError
from trl_ext.annotate.chat_http import TransientError
from trl_ext.method import Unavailable
from trl_ext.rewards.progress import progress, steps_right
from trl_ext.rollouts.synthesis import Ask, Offer, SeedStats, append_records, from_function, sandbox, synthesise
from trl_ext.rollouts.synthesis_endpoint import EndpointSynthesiser, endpoint_synthesiser, read_reply, same_answer
from trl_ext.rollouts.vetting import ACCEPTED, KnownTexts, Vetting, load_evaluation, with_question
from trl_ext.sandbox import tasks
from trl_ext.sandbox.problems import draw, render

EXAM = "a farmer sells nine red apples to each of his seven old friends on monday and counts what is left"
STATS = SeedStats(rbar=0.5, priority=1.0, category="all", epoch=0)


def row(text="How much is 3 + 4?", answer="7", **more):
    return {"prompt": [{"role": "user", "content": text}], "answer": answer, **more}


def vetting(known=(), similar=0.8, max_chars=200):
    return Vetting(KnownTexts(known, 3), Index.of({"exam": EXAM}, {"exam": EXAM}), similar, max_chars)


# Rules and filters


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"more": 1}, "columns: .*'more'"),
        ({"answer": 7}, "column answer: int, the training set has str"),
        ({"prompt": "text"}, "column prompt: str, the training set has list"),
        ({"prompt": []}, "neither text nor turns of text that end with the user's"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "end with the user's"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "turns of text"),
        ({"prompt": [{"role": "user", "content": "  "}]}, "empty"),
        ({"prompt": [{"role": "user", "content": "x" * 201}]}, "longer than 200"),
        ({"prompt": [{"role": "user", "content": "a<|im_start|>system"}]}, "which chat templates use"),
        ({"prompt": [{"role": "user", "content": "a </s> b"}]}, "which chat templates use"),
        ({"prompt": [{"role": "user", "content": "a\x1b[2J"}]}, "control characters"),
        ({"prompt": [{"role": "user", "content": "a \ud800"}]}, "not JSON"),
        ({"answer": object()}, "not JSON"),
    ],
)
def test_rows_that_are_not_whole_or_harmful(changed, words):

    assert re.search(words, vetting().verdict(row() | changed, row()))


def test_a_missing_column_or_no_row_at_all():
    assert vetting().verdict({"prompt": row()["prompt"]}, row()).startswith("columns")
    assert vetting().verdict("text", row()).startswith("columns: str")


def test_an_accepted_row_is_known_from_then_on():
    rules = vetting(["How much is 1 + 1?"])
    assert rules.verdict(row(), row()) == ACCEPTED
    assert rules.verdict(row("how much is 3+4"), row()).startswith("duplicate")  # but for capitals and marks
    assert rules.verdict(row("How much is 1 + 1?"), row()).startswith("duplicate")
    assert rules.verdict(row(answer=None), row("What?", None)).startswith("duplicate")


def test_jaccard_index_by_hand():
    """3-grams of "a b c d e": abc bcd cde; of "a b c d f": abc bcd cdf; two of four are shared."""
    known = KnownTexts(["a b c d e"], 3)
    assert known.likeness("a b c d f") == 0.5 and known.likeness("x y z") == 0 and known.likeness("A b, c d e!") == 1
    assert known.likeness("a b") == 0 and KnownTexts([], 3).likeness("a b c") == 0
    rules = Vetting(known, Index.of({"e": EXAM}, {"e": EXAM}), 0.5, 100)
    assert rules.verdict(row("a b c d f"), row()).startswith("near duplicate: Jaccard index 0.50")


def test_an_instruction_that_most_texts_share_counts_for_neither():
    """Four of five known texts end alike; without that end the new one has nothing in common with them."""
    end = "please reason step by step and box it"
    known = KnownTexts([f"{i} plus {i} is what {end}" for i in range(4)] + ["quite another text here"], 3)
    assert known.likeness(f"the moon is far away {end}") < 0.1
    assert KnownTexts([f"1 plus 1 is what {end}"], 3).likeness(f"the moon is far away {end}") > 0.2


def test_words_of_an_evaluation_contaminate():
    eight = " ".join(EXAM.split()[3:11])
    assert vetting().verdict(row(f"Well, {eight}, so?"), row()).startswith("contamination")
    assert vetting().verdict(row(f"Well, {' '.join(EXAM.split()[3:10])}, so?"), row()) == ACCEPTED  # seven
    assert vetting().verdict(row(solution=eight), row(solution="")).startswith("contamination")


def test_evaluations_by_name_and_file(tmp_path):
    (tmp_path / "exam.txt").write_text(f"{EXAM}\u2028{EXAM}\n\n{EXAM[:40]}\n")  # two lines: only \n ends one
    index = load_evaluation([str(tmp_path / "exam.txt"), "sandbox_json"])
    assert index.met_by(EXAM) == {f"{tmp_path}/exam.txt:0", f"{tmp_path}/exam.txt:1"}
    assert index.met_by(tasks.rows("math", 1, 0, "test")[0]["problem"]) >= {"sandbox_json-0-0000"}
    with pytest.raises(ValueError, match="did you mean"):
        load_evaluation(["sandbox_jsn"])
    assert load_evaluation([]).met_by(EXAM) == set()


def test_the_question_is_replaced_where_it_stands():
    prompt = [{"role": "system", "content": "q"}, {"role": "user", "content": "q? Box it."}]
    assert with_question(prompt, "q?", "new?")[1]["content"] == "new? Box it."
    assert prompt[1]["content"] == "q? Box it." and with_question("q?", "q?", "n") == "n"
    with pytest.raises(ValueError, match=r"exactly once .* 0 times"):
        with_question(prompt, "other", "n")


# Templates of the sandbox


@pytest.mark.parametrize("kind", ["math", "tool"])
def test_sandbox_rows_have_the_seeds_level_and_operations(kind):
    for seed_row in tasks.rows(kind, 30, 1):
        made = sandbox(seed_row, STATS, 2, random.Random(0))
        assert len(made) == 2 and made[0]["problem"] != made[1]["problem"]
        for new in made:
            assert new.keys() == seed_row.keys() and (new["level"], new["kind"]) == (seed_row["level"], kind)
            assert new["hints"][0] == seed_row["hints"][0] and new["prompt"][0]["content"] == new["problem"]
            assert steps_right([new["solution"]], [new["solution"]]) == [1.0]
            assert str(json.loads(new["solution"])["answer"]) == new["answer"]


def test_sandbox_rows_are_never_of_the_held_out_split():
    held_out = {r["problem"] for r in tasks.rows("math", 300, 0, "test", 1)}
    seed_row = tasks.rows("math", 1, 0, "train", 1)[0]
    assert not held_out & {r["problem"] for r in sandbox(seed_row, STATS, 100, random.Random(2))}


def test_sandbox_rows_keep_what_a_recipe_added_to_the_prompt():
    seed_row = tasks.rows("math", 1, 0)[0]
    text = f"Solve: {seed_row['problem']} Box it."
    seed_row = {**seed_row, "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": text}]}
    (new,) = sandbox(seed_row, STATS, 1, random.Random(0))
    assert new["prompt"][1]["content"] == f"Solve: {new['problem']} Box it." and new["prompt"][0]["content"] == "s"


def test_other_rows_need_another_synthesiser():
    with pytest.raises(ValueError, match=r"set synthesizer to your module\.function"):
        sandbox(row(), STATS, 1, random.Random(0))


# Asking, vetting, asking again


def ask(number=0, parent=0, seed=None, **more):
    return Ask(number, parent, seed or row(), STATS, **more)


def test_what_is_refused_is_asked_again_with_new_numbers():
    """Two asks; the second is refused twice. Numbers go on, and the record says why."""
    seen, notes = [], []

    def make(asks):
        seen.append([(a.number, a.parent, a.attempt, a.refused) for a in asks])
        return [Offer(row(f"task {a.number}" if a.parent == 0 or a.attempt == 2 else "known"), None) for a in asks]

    made = synthesise([ask(5, 0), ask(6, 1)], make, vetting(["known"]), 3, notes.append)
    why = "duplicate: the pool has this text"
    assert seen == [[(5, 0, 0, None), (6, 1, 0, None)], [(7, 1, 1, why)], [(8, 1, 2, why)]]
    assert (made["attempts"], made["refused"]) == (4, 2)
    assert [(c["parent"], c["row"]["prompt"][0]["content"]) for c in made["accepted"]] == [
        (0, "task 5"),
        (1, "task 8"),
    ]
    records = [record for round_ in notes for record in round_]
    assert [r["number"] for r in records] == [5, 6, 7, 8]
    assert [r["verdict"] for r in records] == [ACCEPTED, why, why, ACCEPTED]
    assert records[0]["row"] == row("task 5") and records[0]["stats"] == STATS


@pytest.mark.parametrize(("repairs", "limit", "attempts"), [(0, None, 2), (2, None, 6), (3, 5, 5), (3, 2, 2)])
def test_attempts_are_bounded(repairs, limit, attempts):
    made = synthesise(
        [ask(0), ask(1, 1)], lambda a: [Offer(None, "no")] * len(a), vetting(), repairs, lambda r: None, limit
    )
    assert made == {"accepted": [], "attempts": attempts, "refused": attempts}


def test_rounds_before_a_failure_are_noted():
    notes = []

    def make(asks):
        if asks[0].attempt:
            raise Unavailable("down")
        return [Offer(row("fine")), Offer(None, "unreadable")]

    with pytest.raises(Unavailable):
        synthesise([ask(0), ask(1, 1)], make, vetting(), 3, notes.append)
    assert [r["verdict"] for r in notes[0]] == [ACCEPTED, "unreadable"]


def test_a_function_is_called_once_for_each_seed_row():
    calls = []

    def synthesize(seed_row, stats, n, rng):
        calls.append((seed_row["answer"], stats["rbar"], n, rng.random()))
        return [row(f"{seed_row['answer']} {i}") for i in range(min(n, 2))]

    asks = [ask(0), ask(1), ask(2), ask(3, 1, row(answer="9"))]
    offers = from_function(synthesize, seed=4)(asks)
    assert [o.refused for o in offers] == [None, None, "nothing was returned", None]
    assert [c[:3] for c in calls] == [("7", 0.5, 3), ("9", 0.5, 1)]
    assert calls[0][3] == random.Random("rods/4/0").random() and calls[1][3] == random.Random("rods/4/3").random()
    with pytest.raises(ValueError, match="returned 2 rows, asked for 1"):
        from_function(lambda *a: [row(), row()], 0)([ask()])


def test_tuples_become_lists_as_on_disk():
    made = synthesise(
        [ask(seed=row(tags=[1]))], lambda a: [Offer(row("new", tags=[(1, 2)]))], vetting(), 0, lambda r: None
    )
    assert made["accepted"][0]["row"]["tags"] == [[1, 2]]


def test_the_file_is_cut_back_to_where_a_run_goes_on(tmp_path):
    path = tmp_path / "rods" / "rows.jsonl"
    append_records(path, [{"number": 0}, {"number": 1}])
    append_records(path, [{"number": 2}, {"number": 3}])
    with path.open("a") as file:
        file.write('{"number": 4, "cut')  # killed while it wrote
    append_records(path, [{"number": 2, "again": True}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"number": 0},
        {"number": 1},
        {"number": 2, "again": True},
    ]
    append_records(tmp_path / "none.jsonl", [])
    assert not (tmp_path / "none.jsonl").exists()


# Endpoint


TASK = json.dumps({"task": "How much is 5 + 6?", "answer": "11"})


@pytest.fixture
def post(monkeypatch):
    """post.reply(messages' text, body) answers; post.bodies is what was sent."""

    class Post:
        reply = staticmethod(lambda text, body: TASK if "<answer>" in text else '{"answer": 11}')
        bodies: list = []

        def __call__(self, url, payload, key, timeout):
            body = json.loads(payload)
            self.bodies.append(body)
            return self.reply(body["messages"][0]["content"], body)

    found = Post()
    found.bodies = []
    monkeypatch.setattr(endpoint, "post_chat", found)
    return found


def synthesiser(**settings):
    defaults = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "retries": 1, "backoff": 0.0, "concurrency": 1}
    return endpoint_synthesiser(defaults | settings)


def test_a_variant_is_written_and_judged(post):
    (offer,) = synthesiser(keep=["level"])([ask(seed=row(level=3, solution="3 + 4 = 7"))])
    assert offer.refused is None and offer.notes == {"model": "m", "judge": "11"}
    assert offer.row == row("How much is 5 + 6?", "11", level=3, solution=None)
    writing, solving = post.bodies
    assert "How much is 3 + 4?" in writing["messages"][0]["content"] and writing["temperature"] == 1.0
    assert "How much is 5 + 6?" in solving["messages"][0]["content"] and solving["temperature"] == 0.0
    assert "11" not in solving["messages"][0]["content"]  # the judge must not see the answer


def test_a_judge_who_disagrees_refuses(post):
    post.reply = lambda text, body: TASK if "<answer>" in text else '{"answer": "12"}'
    (offer,) = synthesiser()([ask()])
    assert offer.refused == "judge: comes to another answer" and offer.notes["judge"] == "12"
    (offer,) = synthesiser(judge=False)([ask()])
    assert offer.refused is None
    post.reply = lambda text, body: TASK if "<answer>" in text else "eleven"
    assert synthesiser()([ask()])[0].refused.startswith("judge: no JSON")


def test_what_was_refused_is_told(post):
    synthesiser(judge=False)([ask(7, attempt=1, refused="near duplicate")])
    text = post.bodies[0]["messages"][0]["content"]
    assert "variant 7" in text and "was refused: near duplicate" in text


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("", "no JSON"),
        ("Sure! " + TASK, "no JSON"),
        (TASK + TASK, "no JSON"),
        ("[" * 100_000, "longer than"),
        ("[" * 30_000, "no JSON"),
        ('{"task": "a", "answer": "1", "answer": "2"}', "twice"),
        ('{"task": "a", "answer": NaN}', "no JSON"),
        ('{"task": "a", "answer": "\\ud800"}', "surrogate"),
        ('{"task": "a"}', "keys task, answer"),
        ('{"task": "a", "answer": "1", "prompt": "x"}', "keys task, answer and no other"),
        ('{"task": ["a"], "answer": "1"}', "neither text nor a number"),
        ('{"task": "a", "answer": true}', "neither text nor a number"),
        ('{"task": " ", "answer": "1"}', "empty"),
        ('{"task": "a", "answer": "' + "1" * 2001 + '"}', "answer is longer"),
        ("[]", "not one object"),
    ],
)
def test_hostile_replies_are_refused_in_words(reply, words):
    found = read_reply(reply, ("task", "answer"))
    assert isinstance(found, str) and words in found


def test_a_fence_or_a_thought_around_the_object_is_fine():
    assert read_reply(f"```json\n{TASK}\n```", ("task", "answer"))["answer"] == "11"
    assert read_reply(f"<think>hm</think>{TASK}", ("task", "answer"))["answer"] == "11"


def test_the_answer_has_the_seeds_type(post):
    assert synthesiser()([ask(seed=row(answer=7))])[0].row["answer"] == 11
    post.reply = lambda text, body: '{"task": "a?", "answer": "eleven"}'
    assert "invalid literal" in synthesiser()([ask(seed=row(answer=7))])[0].refused
    assert "holds list" in synthesiser()([ask(seed=row(answer=[7]))])[0].refused


def test_a_question_inside_a_longer_prompt(post):
    seed = row("How much is 3 + 4? Box it.", question="How much is 3 + 4?")
    (offer,) = synthesiser(question="question")([ask(seed=seed)])
    assert offer.row["prompt"][0]["content"] == "How much is 5 + 6? Box it."
    assert offer.row["question"] == "How much is 5 + 6?" and "Box it" not in post.bodies[0]["messages"][0]["content"]


def test_equal_answers():
    assert same_answer("1,200", "1200.0") and same_answer("Paris.", " paris") and same_answer("$x+1$", "x + 1")
    assert not same_answer("11", "12") and not same_answer("a", "b")
    assert not same_answer("1,2", "12") and same_answer("-1,234,567.50", "-1234567.5")


def test_one_lost_request_costs_one_row(post):
    def reply(text, body):
        if "variant 0" in text:
            raise TransientError("time-out")
        return TASK if "<answer>" in text else '{"answer": 11}'

    post.reply = reply
    offers = synthesiser()([ask(0), ask(1)])
    assert offers[0].refused == "the endpoint gave no answer" and offers[1].refused is None


@pytest.mark.parametrize("error", [TransientError("no connection"), AnnotatorError("status 401")])
def test_an_endpoint_that_is_down_says_so(post, error):
    def reply(text, body):
        raise error

    post.reply = reply
    with pytest.raises(Unavailable, match=r"no new rows can be made(.|\n)*--resume goes on"):
        synthesiser()([ask()])


def test_replies_on_disk_are_not_asked_for_again(post, tmp_path):
    settings = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}
    for _ in range(2):
        assert endpoint_synthesiser(settings, str(tmp_path))([ask()])[0].refused is None
    assert len(post.bodies) == 2  # one to write, one to judge


def test_unusable_endpoints(monkeypatch):
    with pytest.raises(ValueError, match="needs model"):
        endpoint_synthesiser({"base_url": "http://x"})
    with pytest.raises(ValueError, match="unknown endpoint field modl"):
        endpoint_synthesiser({"base_url": "http://x", "modl": "m"})
    with pytest.raises(ValueError, match="base_url must be"):
        endpoint_synthesiser({"base_url": "x", "model": "m"})
    monkeypatch.delenv("RODS_TEST_KEY", raising=False)
    with pytest.raises(Unavailable, match="RODS_TEST_KEY"):
        EndpointSynthesiser("http://x", "m", api_key_env="RODS_TEST_KEY").check({"answer": "1"})
    with pytest.raises(ValueError, match="names level, question, and the training set has the columns prompt, answer"):
        EndpointSynthesiser("http://x", "m", question="question", keep=["level"]).check({"prompt": "", "answer": ""})
    with pytest.raises(ValueError, match="name the temperature of the writing as `temperature`"):
        EndpointSynthesiser("http://x", "m", extra_body={"temperature": 0.5})


def test_a_judge_that_refuses_every_task_refuses_the_rows(post):
    """Status 400 for the texts alone must not end the run: after a restart it would come again."""

    def reply(text, body):
        if "<answer>" in text:
            return TASK
        raise TransientError("status 400: too long", refused=True)

    post.reply = reply
    offers = synthesiser()([ask(0), ask(1)])
    assert [offer.refused for offer in offers] == ["judge: no answer"] * 2
    judging = (body for body in post.bodies if "<answer>" not in body["messages"][0]["content"])
    assert {body["temperature"] for body in judging} == {0}


def test_an_endpoint_that_refuses_the_first_requests_is_set_up_wrongly(post):
    def reply(text, body):
        raise TransientError("status 400: no such field", refused=True)

    post.reply = reply
    with pytest.raises(Unavailable, match="status 400"):
        synthesiser()([ask()])


# Progress reward


def test_progress_by_hand():
    assert progress([True, True, False], [True, False, True], 4) == 0.25
    assert progress([], [], 3) == 0 and progress([True] * 3, [True] * 3, 3) == 1
    with pytest.raises(ValueError, match="2 states and 1 executions in a task of 3"):
        progress([True, True], [True], 3)
    with pytest.raises(ValueError, match="task of 1 turns"):
        progress([True, True], [True, True], 1)
    with pytest.raises(ValueError, match="a task of 0 turns has no share"):
        progress([], [], 0)


def test_steps_right_counts_steps_and_the_answer():
    problem = draw(random.Random(0), 4)  # three steps
    lines, gold = problem.lines, render(problem.lines, problem.answer)
    replies = [
        gold,
        render(lines[:2], problem.answer),  # stops early: two of three steps, and the answer
        render([lines[0], "1+1=2", lines[2]], 0),
        render([*lines, "1+1=2"], problem.answer),
        "no JSON",
    ]
    assert steps_right(replies, [gold] * 5) == [1.0, 0.75, 0.5, 1.0, 0.0]
    with pytest.raises(ValueError, match="no sandbox solution"):
        steps_right(["x"], ["y"])
