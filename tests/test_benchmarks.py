r"""eval.py: the commands math, mtbench and judge.

The oracle of MATH's string rule is one file of lm-eval (`pip install --no-deps lm-eval==0.4.13`). The judge is a
small server on this machine.
"""

import http.server
import importlib.util
import json
import random
import re
import sys
import threading
from pathlib import Path

import pytest
from conftest import small_folder

import eval
import model


def command(*argv):
    eval.main([str(a) for a in argv])


def lines_of(path):
    return [json.loads(line) for line in open(path)]


# MATH: strings


@pytest.fixture(scope="module")
def lm_eval():
    """lm-eval's MATH rules, read from their one file: the package itself would need all it depends on."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None:
        pytest.skip("lm-eval not installed: pip install --no-deps lm-eval==0.4.13")
    spec = importlib.util.spec_from_file_location(
        "hendrycks_math", Path(spec.origin).parent / "tasks/hendrycks_math/utils.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def solutions(shared):
    return [json.loads(line) for line in open(shared / "math/train_part_3681.jsonl")]


def published(lm_eval, answer):
    """What the published rule makes of an answer, None where it gives up (it then compares the raw strings)."""
    try:
        return lm_eval.strip_string(answer)
    except (AssertionError, IndexError, ValueError):
        return None


REWRITTEN = [
    lambda s: s.replace("\\frac", "\\dfrac"),
    lambda s: s.replace("\\frac", "\\tfrac"),
    lambda s: s.replace("(", "\\left(").replace(")", "\\right)"),
    lambda s: s.replace("+", " + ").replace(",", ", ").replace("{", "{ "),
    lambda s: f" {s} ",
    lambda s: s.replace(" ", ""),
    lambda s: f"{s}\n",
    lambda s: s + "\\text{ cm}",
    lambda s: s + " \\text{ square units}",
    lambda s: s + "\\%",
    lambda s: f"\\${s}",
    lambda s: s + "^\\circ",
    lambda s: s + "^{\\circ}",
    lambda s: f"x = {s}",
    lambda s: f"k={s}",
    lambda s: f"xyz = {s}",
    lambda s: s.replace(",", ",\\!"),
    lambda s: s.replace("\\", "\\\\"),
    lambda s: f"-{s}",
    lambda s: s.replace("0.", "."),
    lambda s: re.sub(r"\\frac\{(.)\}\{(.)\}", r"\\frac\1\2", s),
    lambda s: re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", s),
    lambda s: re.sub(r"\\sqrt\{(.)\}", r"\\sqrt\1", s),
    lambda s: f"{s}.",
    lambda s: f"${s}$",
    lambda s: s + " or 0.5",
]
MORE = [
    "0.5",
    ".5",
    "0.50",
    "-.5",
    "1/2",
    "-1/2",
    "01/2",
    "1/-2",
    "{.5}",
    "50\\%",
    "\\frac12",
    "\\frac1{72}",
    "\\frac{72}1",
    "\\sqrt 3",
    "",
]


def test_boxes_of_all_solutions(lm_eval, solutions):
    for row in solutions:
        assert (
            eval.boxed(row["solution"])
            == row["answer"]
            == lm_eval.remove_boxed(lm_eval.last_boxed_only_string(row["solution"]))
        )


def test_normalise_equals_lm_eval_on_all_answers_and_their_rewritten_forms(lm_eval, solutions):
    answers = sorted({row["answer"] for row in solutions})
    assert {a for a in answers if published(lm_eval, a) is None} == {
        "\\begin{pmatrix} 0 \\\\ 1/11 \\end{pmatrix}"
    }  # one "/", sides not integers
    for answer in answers + MORE:
        for form in [answer, *(rewrite(answer) for rewrite in REWRITTEN)]:
            want = published(lm_eval, form)
            if want is not None:
                assert eval.normalise(form) == want, form
                if published(lm_eval, answer) is not None:
                    assert (eval.normalise(form) == eval.normalise(answer)) == lm_eval.is_equiv(
                        form, answer
                    ), form


def test_normalise_differs_from_lm_eval_only_where_that_gives_up(lm_eval):
    """Random strings of what answers are made of: the differences are those that normalise's docstring names."""
    parts = [
        "\\frac",
        "\\dfrac",
        "\\sqrt",
        "{",
        "}",
        "1",
        "2",
        "0",
        "0.5",
        ".5",
        " ",
        "/",
        "=",
        "k",
        "\\text{ cm}",
        "\\left(",
        "\\right)",
        "^\\circ",
        "^{\\circ}",
        "\\%",
        "\\$",
        "-",
        "\\!",
        "\\\\",
        "\n",
        "\\pi",
        "10",
    ]
    rng, differ = random.Random(0), 0
    for _ in range(20000):
        text = "".join(rng.choices(parts, k=rng.randint(1, 6)))
        want, got = published(lm_eval, text), eval.normalise(text)
        if want is None:
            assert text.count("\\text{ ") > 1 or got.count("/") == 1 or re.search(r"(frac|sqrt)", text), text
        elif got != want:
            differ += 1
            assert re.search(r"\\frac[^{]?(\\frac|$)", want), text
    assert differ


def test_without_the_oracle_the_rule_holds():
    for a, b in (
        ("\\tfrac12", "\\frac{1}{2}"),
        ("1/2", "\\frac{1}{2}"),
        ("0.5", "\\frac{1}{2}"),
        (".25", "0.25"),
        ("\\sqrt3", "\\sqrt{3}"),
        ("5\\text{ cm}", "5"),
        ("k = 5", "5"),
        ("\\left( 1, 2 \\right)", "(1,2)"),
        ("90^\\circ", "90"),
        ("50\\%", "50"),
        ("\\$5", "5"),
        ("1,\\!000", "1,000"),
        ("x/y", "x / y"),
        ("\\frac", "\\frac "),
    ):
        assert eval.normalise(a) == eval.normalise(b), (a, b)
    for a, b in (
        ("50\\%", "0.5"),
        ("1,000", "1000"),
        ("0.25", "\\frac{1}{4}"),
        ("x+1", "1+x"),
        ("$5$", "5"),
        ("xyz=5", "5"),
    ):
        assert eval.normalise(a) != eval.normalise(b), (a, b)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so \\boxed{\\frac{1}{2}} is", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{\\{2\\}}", "\\{2\\}"),
        ("\\fbox{3}", "3"),
        ("$\\boxed 5$ it is", "5"),
        ("none", None),
        ("\\boxed{1", None),
    ],
)
def test_boxed(text, answer):
    assert eval.boxed(text) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        ("The answer is: 5", "5"),
        ("The answer is: 5.", "5"),
        ("The answer is: 1\nThe answer is: 0.5.\nMore.", "0.5"),
        ("The answer is: x.\nIt is. ", "x"),
        ("5", None),
        ("The answer is:5", None),
        ("The answer is: ", ""),
    ],
)
def test_extract_math(text, answer):
    assert eval.extract_math(text) == answer


# the commands, on a small network whose answers the test writes


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "base"
    small_folder(folder, max_len=6000)
    return folder


@pytest.fixture
def says(monkeypatch, tmp_path):
    """In a fresh folder: says.text(prompt) writes the answers, says.asked keeps (prompt, temperature), and after says.limit answers the command is killed."""

    class Says:
        text, asked, limit = (lambda prompt: "x"), [], 10**9

    def generate(net, prompts, max_new=256, temperature=0.0, eos=None, seed=0):
        answers = []
        for ids in prompts:
            if Says.limit == 0:
                raise KeyboardInterrupt
            Says.limit -= 1
            prompt = bytes(b for b in ids if b < 256).decode()
            Says.asked.append((prompt, temperature))
            answers.append(list(Says.text(prompt).encode()))
        return answers

    Says.asked = []
    monkeypatch.setattr(model.Transformer, "generate", generate)
    monkeypatch.chdir(tmp_path)
    return Says


def test_math_command(base, says, capsys, tmp_path):
    rows = [
        dict(problem="a?", solution="It is $\\boxed{\\frac{1}{4}}$.", level="Level 1", type="Algebra"),
        dict(problem="b?", solution="$\\boxed{5}$", level="Level 2", type="Algebra"),
        dict(problem="c?", solution="$\\boxed{(1,2)}$", level="Level 2", type="Geometry"),
        dict(problem="d?", solution="no box", level="Level 2", type="Geometry"),
    ]
    Path("math.jsonl").write_text("\n".join(map(json.dumps, rows)))
    replies = {
        "a?": "The answer is: 0.25.",
        "b?": "So k is 5. The answer is: k = 5.\nDone.",
        "c?": "it is (1,2)",
        "d?": "The answer is: 1",
    }
    says.text = lambda prompt: next(v for k, v in replies.items() if k in prompt)
    command("math", f"--init={base}", "--data=math.jsonl")
    out = capsys.readouterr().out
    assert "1 of 4 rows have no gold answer and count as wrong" in out
    assert "exact match 25.00 % (1 of 4), 95 % interval 4.56 to 69.94 -> out/math-base.jsonl" in out
    assert {prompt for prompt, _ in says.asked} == {eval.fill("alpaca", row["problem"]) for row in rows}
    assert "at most 1024 tokens" in out
    head, *lines = lines_of("out/math-base.jsonl")
    assert sorted((line["row"], line["got"], line["gold"]) for line in lines) == [
        (0, "0.25", "\\frac{1}{4}"),
        (1, "k = 5", "5"),
        (2, None, "(1,2)"),
        (3, "1", None),
    ]
    if importlib.util.find_spec("math_verify"):
        assert "equal by math_verify 50.00 % (2 of 4)" in out
    command("math", f"--init={base}", "--data=math.jsonl")
    assert len(says.asked) == 4  # the same answers, judged again
    command("math", f"--init={base}", "--data=math.jsonl", "--last=2", "--out=other")
    assert "exact match 0.00 % (0 of 2)" in capsys.readouterr().out
    assert [line["gold"] for line in sorted(lines_of("out/other.jsonl")[1:], key=lambda x: x["row"])] == [
        "(1,2)",
        None,
    ]


def test_gsm8k_counts_as_published(base, says, capsys):
    """It reads 1,234,567 as 1234 on either side and rounds 2.4 to 2, as the published code does."""
    rows = [
        dict(question="a?", answer="#### 1,234,567"),
        dict(question="b?", answer="#### 2"),
        dict(question="c?", answer="#### 5"),
    ]
    Path("gsm.jsonl").write_text("\n".join(map(json.dumps, rows)))
    replies = {"a?": "The answer is: 1,234,567", "b?": "The answer is: 2.4", "c?": "The answer is: 5.00"}
    says.text = lambda prompt: next(v for k, v in replies.items() if k in prompt)
    command("gsm8k", f"--init={base}", "--data=gsm.jsonl")
    assert "exact match 66.67 % (2 of 3)" in capsys.readouterr().out


def test_math_without_math_verify_says_so(base, says, capsys, monkeypatch):
    Path("math.jsonl").write_text(json.dumps(dict(problem="a?", solution="$\\boxed{5}$")))
    says.text = lambda prompt: "The answer is: 5"
    monkeypatch.setitem(sys.modules, "math_verify", None)
    command("math", f"--init={base}", "--data=math.jsonl")
    out = capsys.readouterr().out
    assert "exact match 100.00 % (1 of 1)" in out and "pip install math_verify" in out


@pytest.mark.parametrize(
    "got, gold, equal",
    [
        ("0.25", "\\frac{1}{4}", True),
        ("x+1", "1 + x", True),
        ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt2}", True),
        ("\\frac12", "\\frac{1}{2}", True),
        ("5", "500", False),
        ("(1,2)", "(2,1)", False),
        (None, "1", False),
        ("1", None, False),
    ],
)
def test_equality_as_mathematics(got, gold, equal):
    pytest.importorskip("math_verify")
    assert eval.same_mathematics(dict(got=got, gold=gold)) is equal


# MT-Bench

CATEGORIES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}


def test_mtbench_answers(base, says, shared):
    """FastChat's fields, its temperatures, turn one in turn two's prompt, and no question asked twice after a kill."""
    asked = lines_of(shared / "mt_bench/question.jsonl")
    says.text = lambda prompt: f" answer {len(prompt)}"
    args = ["mtbench", f"--init={base}", f"--data={shared}/mt_bench/question.jsonl", "--batch_size=1"]
    for killed_after in (30, 70):  # in turn one, in turn two
        says.limit = killed_after
        with pytest.raises(KeyboardInterrupt):
            command(*args)
        assert not Path("out/mtbench-base.jsonl").exists()
        with open(f"out/mtbench-base-turn{1 if killed_after == 30 else 2}.jsonl", "a") as f:
            f.write('{"row": 7, "ans')
    says.limit = 10**9
    command(*args)
    records = lines_of("out/mtbench-base.jsonl")
    assert len(says.asked) == 160 == len(set(says.asked)) and [r["question_id"] for r in records] == [
        q["question_id"] for q in asked
    ]
    temperatures = dict(says.asked)
    for q, r in zip(asked, records):
        assert set(r) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert r["model_id"] == "base" and r["tstamp"] > 1e9 and len(r["answer_id"]) == 16
        first = eval.fill("alpaca", q["turns"][0])
        second = f"{first} answer {len(first)}\n\n### Instruction:\n{q['turns'][1]}\n\n### Response:"
        assert temperatures[first] == temperatures[second] == CATEGORIES[q["category"]]
        assert r["choices"] == [dict(index=0, turns=[f"answer {len(first)}", f"answer {len(second)}"])]
    command(*args)
    assert len(says.asked) == 160 and lines_of("out/mtbench-base.jsonl") == records


def test_mtbench_on_a_real_network(base, shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command(
        "mtbench",
        f"--init={base}",
        f"--data={shared}/mt_bench/question.jsonl",
        "--limit=3",
        "--max_new=3",
        "--out=mine",
    )
    assert [len(r["choices"][0]["turns"]) for r in lines_of("out/mine.jsonl")] == [2, 2, 2] and lines_of(
        "out/mine-turn1.jsonl"
    )[0]["temperature"] == [0.7]


def test_on_a_run(base, says, shared, capsys):
    """A run brings its template, its adapter's hash and its folder; `judge --run` finds the answers there."""
    import train_nlg

    Path("rows.jsonl").write_text(
        "\n".join(
            json.dumps(dict(problem=f"{a}?", solution=f"\\boxed{{{a}}} The answer is: {a}"))
            for a in range(20)
        )
    )
    train_nlg.main(
        [
            f"--init={base}",
            "--data=rows.jsonl",
            "--out_dir=run",
            "--template=plain",
            "--max_iters=1",
            "--batch_size=4",
            "--eval_rows=4",
            "--r=4",
            "--eval_generate=0",
            "--max_new=9",
        ]
    )
    says.text = lambda prompt: "The answer is: " + prompt.rstrip("?\n")
    command("math", "--run=run", "--data=rows.jsonl", "--last=5")
    out = capsys.readouterr().out
    assert "exact match 100.00 % (5 of 5)" in out and "run/math.jsonl" in out and "at most 1024 tokens" in out
    command("mtbench", "--run=run", f"--data={shared}/mt_bench/question.jsonl", "--limit=2")
    first, second = (q["turns"] for q in lines_of(shared / "mt_bench/question.jsonl")[:2])
    assert (f"{first[0]}\nThe answer is: {first[0]}\n\n{first[1]}\n", 0.7) in says.asked and lines_of(
        "run/mtbench.jsonl"
    )[1]["model_id"] == "run"
    command("judge", "--answers=run/mtbench.jsonl", f"--data={shared}/mt_bench/question.jsonl")
    assert (
        "0 of 4 turns are rated (--judge_url=URL rates the rest) -> run/mtbench-gpt-4_single.jsonl"
        in capsys.readouterr().out
    )


def test_next_turn_in_other_templates():
    assert (
        eval.next_turn("plain", "q\na", "r") == "q\na\n\nr\n"
        and eval.next_turn("Q {instruction} A", "Q x A y", "z") == "Q x A y\n\nQ z A"
    )


def test_questions(tmp_path):
    hub = dict(prompt=["a", "b"], prompt_id=7, category="math", reference=["c", "d"])
    (tmp_path / "q.jsonl").write_text(json.dumps(hub))
    want = dict(turns=["a", "b"], category="math", ref_answer=["c", "d"], temperature=0.0)
    assert eval.questions(str(tmp_path / "q.jsonl")) == {7: want}
    for wrong in (dict(hub, category="maths"), dict(hub, prompt=["a"]), dict(hub, prompt="ab")):
        (tmp_path / "w.jsonl").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="w.jsonl: .*expected FastChat's form"):
            eval.questions(str(tmp_path / "w.jsonl"))


# the judge


@pytest.mark.parametrize(
    "text, score",
    [
        ("Rating: [[8]]", 8),
        ("Rating: [[8.5]]", 8.5),
        ("Rating: [8]", 8),
        ("[[ 7 ]]", 7),
        ("[1] says so. Rating: [[9]]", 9),
        ("first [[3]], then [[4]]", 3),
        ("Rating: 8", -1),
        ("", -1),
        ("[[A]]", -1),
        ("[[11]]", -1),
        ("[[0]]", -1),
        ("as in [2023]", -1),
        ("[[10.0]]", 10),
        ("[[rating]] [[6]]", 6),
    ],
)
def test_rating(text, score):
    assert eval.rating(text) == score


@pytest.fixture
def server(monkeypatch):
    """A chat endpoint: server.reply(n, body) -> (status, headers, text), or a number of seconds to be silent; server.asked keeps (path, key, body)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.asked.append((self.path, self.headers.get("Authorization"), body))
                reply = server.reply(len(server.asked) - 1, body)
            if isinstance(reply, float):
                server.hush.wait(reply)
                return
            status, headers, text = reply
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text if isinstance(text, bytes) else text.encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.lock, server.asked, server.hush, server.url = (
        threading.Lock(),
        [],
        threading.Event(),
        f"http://127.0.0.1:{server.server_port}/v1",
    )
    server.reply = lambda n, body: good("Rating: [[8]]")
    openai = pytest.importorskip("openai")
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.02)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.hush.set()
    server.shutdown()
    server.server_close()
    thread.join()


def good(text):
    return (
        200,
        {"Content-Type": "application/json"},
        json.dumps(dict(choices=[dict(message=dict(role="assistant", content=text))])),
    )


def test_the_judge_follows_no_redirect(server):
    server.reply = lambda n, body: (
        (307, {"Location": f"{server.url}/elsewhere"}, "") if n == 0 else good("[[10]]")
    )
    with pytest.raises(ValueError, match="307.*check --judge_url"):
        eval.ask_judge(server.url, "gpt-4", "You judge.", "Rate this.")
    assert [path for path, *_ in server.asked] == ["/v1/chat/completions"]


@pytest.fixture
def answers(shared, tmp_path):
    """Answers to all 80 questions in FastChat's format, and the judge command's arguments for them."""
    path = tmp_path / "mine.jsonl"

    def record(key):
        turns = [f"first {key}", "second {x}"]
        return dict(question_id=key, answer_id="a", model_id="mine", choices=[dict(index=0, turns=turns)])

    path.write_text(
        "".join(
            json.dumps(record(q["question_id"])) + "\n" for q in lines_of(shared / "mt_bench/question.jsonl")
        )
    )
    folder = shared / "mt_bench"
    return path, [
        "judge",
        f"--answers={path}",
        f"--data={folder}/question.jsonl",
        f"--judge_prompts={folder}/judge_prompts.jsonl",
        f"--references={folder}/reference_answer/gpt-4.jsonl",
        "--judge_model=gpt/4",
    ]


def test_judge(server, answers, shared, capsys):
    """FastChat's fields and prompts; means by turn and category."""
    path, args = answers

    def reply(n, body):
        text = body["messages"][1]["content"]
        if "Reference" in text:
            return good("so [[9]]")
        return good("no rating" if "first 81" in text else "[[6.5]]")

    server.reply = reply
    command(*args, f"--judge_url={server.url}/")
    out, lines = capsys.readouterr().out, lines_of(path.with_name("mine-gpt_4_single.jsonl"))
    assert len(lines) == 160 == len({(line["question_id"], line["turn"]) for line in lines})
    by = {(line["question_id"], line["turn"]): line for line in lines}
    prompts = {p["name"]: p for p in lines_of(shared / "mt_bench/judge_prompts.jsonl")}
    questions = {q["question_id"]: q for q in lines_of(shared / "mt_bench/question.jsonl")}
    references = {
        r["question_id"]: r["choices"][0]["turns"]
        for r in lines_of(shared / "mt_bench/reference_answer/gpt-4.jsonl")
    }
    for (key, turn), line in by.items():
        q, a, solved = questions[key], [f"first {key}", "second {x}"], key in references
        name = f"single{'-math' if solved else ''}-v1{'-multi-turn' if turn == 2 else ''}"
        words = dict(
            question=q["turns"][0],
            answer=a[0],
            question_1=q["turns"][0],
            question_2=q["turns"][1],
            answer_1=a[0],
            answer_2=a[1],
        )
        words |= {f"ref_answer_{i}": t for i, t in enumerate(references.get(key, ()), 1)}
        assert set(line) == {
            "question_id",
            "model",
            "judge",
            "user_prompt",
            "judgment",
            "score",
            "turn",
            "tstamp",
        }
        assert solved == (q["category"] in ("math", "coding", "reasoning")) and line[
            "user_prompt"
        ] == prompts[name]["prompt_template"].format(**words)
        assert (
            line["model"] == "mine"
            and line["judge"] == ["gpt/4", name]
            and line["score"] == (9 if solved else -1 if key == 81 else 6.5)
        )
    where, key, body = server.asked[0]
    assert (
        where == "/v1/chat/completions"
        and key == "Bearer sk-test"
        and (body["temperature"], body["max_tokens"], body["model"]) == (0, 2048, "gpt/4")
    )
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert {body["messages"][0]["content"] for _, _, body in server.asked} == {
        p["system_prompt"] for name, p in prompts.items() if "single" in name
    }
    mean = (30 * 9 + 49 * 6.5) / 79
    for words in ("all turns       {:.2f}  (158 ratings)", "turn 1          {:.2f}  (79 ratings)"):
        assert words.format(mean) in out
    assert "math            9.00  (20 ratings)" in out and "writing         6.50  (18 ratings)" in out
    assert "2 of 160 judgments hold no rating" in out
    command(*args, f"--judge_url={server.url}")
    assert len(server.asked) == 160 and "160 of 160 turns are rated" in capsys.readouterr().out


def test_judge_goes_on_where_it_was_stopped(server, answers, capsys):
    path, args = answers
    out = path.with_name("mine-gpt_4_single.jsonl")
    refusal = (400, {}, json.dumps(dict(error=dict(message="bad\nrequest"))))
    server.reply = lambda n, body: good("[[5]]") if n < 40 else refusal
    with pytest.raises(ValueError, match="bad.*request.*check --judge_url, --judge_model=gpt/4") as e:
        command(*args, f"--judge_url={server.url}")
    assert "\n" not in str(e.value) and "sk-test" not in str(e.value)
    kept = lines_of(out)
    assert len(kept) == 40 and len(server.asked) == 41  # nothing paid for is lost, the rest is not asked
    with open(out, "a") as f:
        f.write('{"question_id": 160, "sco')  # as a kill leaves it
    server.reply = lambda n, body: good("[[7]]")
    before = len(server.asked)
    command(*args, f"--judge_url={server.url}")
    assert len(server.asked) - before == 120
    assert lines_of(out)[:40] == kept and len(lines_of(out)) == 160
    path.write_text(path.read_text().replace("first 81", "another"))
    with pytest.raises(ValueError, match="question 81 turn 1 was rated for another answer"):
        command(*args, f"--judge_url={server.url}")
    with pytest.raises(ValueError, match="mine.jsonlx: expected the mtbench.jsonl"):
        command(*args, f"--answers={path}x")


def test_judge_without_a_judge(answers, capsys):
    path, args = answers
    command("judge", f"--answers={path}", args[2])
    out = capsys.readouterr().out
    assert "0 of 160 turns are rated (--judge_url=URL rates the rest)" in out


TROUBLES = {
    "rate limit": (429, {"Retry-After": "0"}, "slow down"),
    "server error": (500, {}, "oops"),
    "overloaded": (503, {}, "<html>"),
    "cut off": (200, {"Content-Type": "application/json", "Content-Length": "1000"}, '{"choices'),
    "connection closed": 0.0,
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_the_client_tries_again(server, trouble):
    server.reply = lambda n, body: TROUBLES[trouble] if n < 2 else good("fine [[8]]")
    assert eval.ask_judge(server.url, "m", "system", "text") == "fine [[8]]" and len(server.asked) == 3


def test_a_dead_judge_is_given_up(server, answers):
    path, args = answers
    server.reply = lambda n, body: (503, {}, "")
    with pytest.raises(ValueError, match="check --judge_url.*The same command goes on where it was"):
        command(*args, f"--judge_url={server.url}")
    assert len(server.asked) == 6 and not lines_of(path.with_name("mine-gpt_4_single.jsonl"))
    server.reply = lambda n, body: good("[[7]]")
    command(*args, f"--judge_url={server.url}")
    assert len(server.asked) == 166 and len(lines_of(path.with_name("mine-gpt_4_single.jsonl"))) == 160


NO_TEXT = '{"choices": [{"message": {"role": "assistant", "content": null}}]}'


@pytest.mark.parametrize("text", ["<html>", b"\xff", '{"error": "x"}', '{"choices": []}', NO_TEXT, "[1]"])
def test_a_reply_that_is_none_is_one_line(server, text):
    server.reply = lambda n, body: (200, {"Content-Type": "application/json"}, text)
    with pytest.raises(ValueError, match="check --judge_url") as e:
        eval.ask_judge(server.url, "m", "system", "text")
    assert "\n" not in str(e.value)


def test_a_wrong_key_is_said_at_once(server, answers, monkeypatch):
    path, args = answers
    server.reply = lambda n, body: (401, {}, json.dumps(dict(error=dict(message="Incorrect API key"))))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="Incorrect API key.*the key in OPENAI_API_KEY"):
        command(*args, f"--judge_url={server.url}")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--judge_url=http://x", "--judge_prompts="], "--judge_prompts is missing: give a"),
        (["--judge_url=http://x", "--references="], "question 1.. needs --references=gpt-4.jsonl"),
        (["--answers="], "mtbench"),
    ],
)
def test_bad_judge_options(answers, argv, words):
    with pytest.raises(ValueError, match=words):
        command(*answers[1], *argv)


def test_bad_answers(answers):
    path, args = answers
    record = lines_of(path)[0]
    for wrong, words in (
        (dict(record, choices=[]), "expected FastChat's form"),
        (dict(record, choices=[dict(turns=["one"])]), "expected FastChat's form"),
        (dict(record, choices=3), "expected FastChat's form"),
        (dict(record, question_id=7), "question 7 is answered, but not in --data"),
        (dict(question_id=81), "expected FastChat's form"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=words):
            command(*args, "--judge_url=http://x")


def test_bad_judge_prompts(answers, tmp_path):
    path, args = answers
    for text, words in (
        ('{"name": "single-v1"}', "expected FastChat's form"),
        ("{", "line 1: Expecting"),
        ("", "no rows"),
        ('{"name": "x", "system_prompt": "", "prompt_template": ""}', "KeyError: 'single-v1'"),
        ('{"name": "single-v1", "system_prompt": "", "prompt_template": "{nothing}"}', "nothing"),
    ):
        (tmp_path / "p.jsonl").write_text(text)
        with pytest.raises(ValueError, match=words):
            command(*args, "--judge_url=http://x", f"--judge_prompts={tmp_path}/p.jsonl")
