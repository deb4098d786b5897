"""eval.py: HumanEval and MBPP, and the sandbox that runs what a model wrote. A machine without bwrap skips it."""

import gzip
import json
import os
import random
import re
import shutil
import socket
import sys
import time
from multiprocessing.pool import ThreadPool

import pytest
from conftest import small_folder

import eval

QUICK = dict(eval.LIMITS, wall=6, CPU=1, AS=2**29)


@pytest.fixture(scope="session")
def sandbox():
    reason = eval.sandbox_fault()
    if reason:
        pytest.skip(f"no sandbox on this machine: {reason}")
    return eval.sandbox_command()


# answers


@pytest.mark.parametrize(
    "answer, code",
    [
        (
            "Sure!\n```python\ndef f(x):\n    return x\n```\nIt works:\n```python\nf(1)\n```",
            "def f(x):\n    return x\n",
        ),
        ("```\nx = 1\n```", "x = 1\n"),
        ("Answer: ```python\n    return 1```\nIt is one.", "    return 1"),
        ("```bash\npip install x\n```\n```Python3 \nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1"),
        ("\n \n    return 1\n", "    return 1\n"),
        ("def f():\n    assert 1\n    return 1\nassert f() == 2\n", "def f():\n    assert 1\n    return 1\n"),
        ("x = 1\n# Example usage:\nprint(x)", "x = 1\n"),
        ('x = 1\nif __name__ == "__main__":\n    x = 2', "x = 1\n"),
        ("asserted = 1", "asserted = 1"),
        ("", ""),
    ],
)
def test_extract_code(answer, code):
    assert eval.extract_code(answer) == code


def test_humaneval_program_takes_a_whole_function_or_a_body():
    prompt = 'import math\n\n\ndef f(x):\n    """Double."""\n'
    for answer in (
        "    return 2 * x",
        "return 2 * x",
        " return 2 * x\n",
        "```python\n    if x:\n        return 2 * x\n    return 0\n```\n",
        "    return g(x)\n\ndef g(x):\n    return 2 * x",
        "\nif x:\n    return 2 * x\nreturn 0",
        "```python\ndef f(x):\n    return 2 * x\n```",
        " def f(x):\n    return g(x)\n\ndef g(x):\n    return 2 * x",
        prompt + "    return 2 * x\nassert f(1) == 3",
        "    def f(x):\n        return 2 * x",
    ):
        space = {}
        exec(prompt.rstrip() + eval.completion(answer, "f"), space)  # our own text
        assert space["f"](4) == 8, answer


# the sandbox

MARK = f"balora-{os.getpid()}-{time.time_ns()}"
SPAWN = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)', '{MARK}'], start_new_session=True)\n"
EVERYTHING = "import gc, inspect, os, sys\nprint(sys.argv, os.environ, gc.get_objects()[:1], sys._getframe().f_back.f_locals, list(sys.modules))\n"
HOSTILE = {  # program: what its verdict says
    "while True: pass": "CPU time",
    "import time\ntime.sleep(99)": "stopped after 6 s",
    "x = bytearray(2 * 10**9)": "MemoryError",
    "x = []\nwhile True: x.append(bytearray(10**7))": "MemoryError|CPU time|stopped after",  # whichever limit a busy machine meets first
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass": "CPU time|stopped after",
    "while True: print('x' * 1000)": "File size limit|CPU time|stopped after",
    "import os\nwhile True: os.write(2, b'x' * 1000)": "File size limit|CPU time|stopped after",
    "i = 0\nwhile True:\n    i += 1\n    open(f'/tmp/{i}', 'wb').write(b'x' * 10**6)": "No space left|CPU time|stopped after",
    "open('/tmp/x', 'wb').write(b'x' * 10**7)": "File size limit",
    "import os\nos.remove({file!r})": "FileNotFoundError|Read-only file system",
    "import os\nos.remove({ours!r})": "Read-only file system",
    "import shutil\nshutil.rmtree({prefix!r})": "Read-only file system|PermissionError",
    "open('/usr/x', 'w')": "Read-only file system",
    "open('/x', 'w')": "Read-only file system",
    "import os\nos.kill(os.getppid(), 9)\nraise SystemExit": "PermissionError|status 0",
    "import os\nos.kill(-1, 9)\nraise SystemExit": "No such process",
    "import os\nos.killpg(0, 9)": "Killed",
    "import sys\nsys.exit(0)": "status 0",
    "import os\nos._exit(0)": "status 0",
    "import os\nos.execv('/bin/true', ['true'])": "status 0",
    "import sys\nsys.setrecursionlimit(10**8)\nf = lambda: f()\nf()": "Segmentation|CPU time|MemoryError",
    SPAWN + "raise SystemExit": "status 0",
    SPAWN + "import time\ntime.sleep(99)": "stopped after",
    "import socket\nsocket.create_connection(('127.0.0.1', {port}))": "unreachable|refused",
    "import socket\nsocket.create_connection(('1.1.1.1', 53))": "unreachable",
    "import os\nos.listdir({home!r})": "FileNotFoundError|PermissionError",
    "open({file!r}).read()": "FileNotFoundError",
    "open('/etc/passwd').read()": "FileNotFoundError",
    "open('/proc/1/status').read()": "FileNotFoundError",
    "import os\nassert not os.environ.get('SECRET') and 'HOME' not in os.environ and not os.read(0, 1)\nraise SystemExit": "status 0",
    "import os\nassert os.getuid() != 0\nos.setuid(0)": "Invalid argument|not permitted",
    "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0, 'no new namespace'": "no new namespace",
    "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))": "not allowed",
    EVERYTHING
    + "for i in range(64):\n    try: print(os.read(i, 999))\n    except OSError: pass\nsys.stdout.flush()\nos._exit(0)": "",
    "import builtins, os, sys\nbuiltins.print = sys.stdout.write = os.write = os.read = lambda *a: 1\nsys.exit = os._exit = lambda *a: 1": "AssertionError",
    "import atexit\natexit.register(print, 'passed')\nraise SystemExit": "passed",
    "x = 1\0": "null bytes",
    "(" * 5000: "SyntaxError",
}


@pytest.fixture(scope="session")
def verdicts(sandbox, tmp_path_factory):
    """All hostile programs, two at a time: {program: (passed, why, seconds)}; a server listens and a file lies in the home folder meanwhile."""
    file = os.path.expanduser(f"~/.{MARK}")
    mine = tmp_path_factory.mktemp("ours") / "x"
    mine.write_text("x")
    names = dict(
        file=file,
        ours=os.path.join(
            os.path.realpath(sys.base_prefix), "bin", os.path.basename(os.path.realpath(sys.executable))
        ),
        prefix=sys.prefix,
        home=os.path.expanduser("~"),
    )
    os.environ["SECRET"] = "1"
    with socket.create_server(("127.0.0.1", 0)) as server, open(file, "w"), ThreadPool(2) as pool:

        def run(program):
            start, text = time.time(), program
            for name, value in dict(names, port=server.getsockname()[1]).items():
                text = text.replace("{%s}" % name, str(value)).replace("{%s!r}" % name, repr(value))
            return *eval.run_program(sandbox, text, "assert False, 'the test'", QUICK), time.time() - start

        try:
            found = dict(zip(HOSTILE, pool.map(run, HOSTILE, chunksize=1)))
            assert all(os.path.exists(p) for p in names.values())
        finally:
            os.remove(file)
            del os.environ["SECRET"]
    return found


@pytest.mark.parametrize(
    "program", HOSTILE, ids=lambda p: p.splitlines()[-1][:40] if len(p) < 2000 else "nested"
)
def test_hostile_programs_are_contained(verdicts, program):
    passed, why, seconds = verdicts[program]
    assert not passed and re.search(HOSTILE[program], why) and seconds < 60, (why, seconds)


def processes(mark):
    """Ids of the living processes whose command line holds `mark`."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if mark.encode() in open(f"/proc/{pid}/cmdline", "rb").read():
                found.append(pid)
        except OSError:
            pass
    return found


def test_no_process_outlives_its_run(sandbox, verdicts):
    end = time.time() + 3
    while processes(MARK) and time.time() < end:  # a killed one may take a moment to go
        time.sleep(0.05)
    assert not processes(MARK)


def test_what_the_programs_may_do(sandbox):
    """Ordinary programs pass: files in the temporary folder, threads, output, dataclasses, imports of the standard library."""
    program = """
import dataclasses, sys, tempfile, threading
@dataclasses.dataclass
class A:
    x: 'int' = 1
t = threading.Thread(target=print)
t.start()
t.join()
print('é' * 1000)
with tempfile.TemporaryFile('w+') as f:
    f.write('a')
    f.seek(0)
    read = f.read()
with open('b', 'w') as f:
    f.write('c')
if __name__ == '__main__':
    sys.exit(1)
"""
    assert eval.run_program(
        sandbox, program, "assert A().x == 1 and read == 'a' and open('b').read() == 'c'"
    ) == (True, "")
    assert eval.run_program(sandbox, program, "assert A().x == 2, 'not two'") == (
        False,
        "AssertionError: not two",
    )
    assert eval.run_program(
        sandbox,
        "import os\nassert os.listdir('/tmp') in ([], [os.sep.join({!r}.split(os.sep)[2:3])])".format(
            sys.prefix
        ),
        "",
    ) == (True, "")
    assert eval.run_program(sandbox, "x = '\ud800'", "assert x == '?'") == (True, "")
    assert eval.run_program(sandbox, "x = 1\n" + "#" * 300000, "assert x == 1") == (
        True,
        "",
    )  # more than a pipe or an argument holds


def test_a_sandbox_that_fails_is_no_verdict(sandbox, monkeypatch):
    with pytest.raises(ValueError, match="the sandbox did not start"):
        eval.run_program([*sandbox[:-2], "--no-such-option"], "", "")
    monkeypatch.setattr(eval, "sandbox_command", lambda: ["sh", "-c", "echo no; exit 1"])
    reason = eval.sandbox_fault()
    assert "the sandbox did not start" in reason and "--privileged" in reason and "\n" not in reason
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert eval.sandbox_fault() == "bwrap is not installed (on Linux: apt install bubblewrap)"


# the data sets' own solutions


def solve(sandbox, jobs):
    with ThreadPool(os.cpu_count()) as pool:
        return pool.map(lambda job: eval.run_program(sandbox, *job), jobs)


def test_humaneval_reference_solutions(sandbox, shared):
    """Every fourth problem (all 164 pass, in 5 s on two cores): the bare body, and for a few the whole function; an empty answer fails."""
    rows = [json.loads(line) for line in gzip.open(shared / "humaneval/HumanEval.jsonl.gz", "rt")]

    def job(row, answer):
        code = row["prompt"].rstrip() + eval.completion(answer, row["entry_point"])
        return code, f"{row['test']}\ncheck({row['entry_point']})\n"

    assert (
        len(rows) == 164
        and solve(sandbox, [job(row, row["canonical_solution"]) for row in rows[::4]]) == [(True, "")] * 41
    )
    assert (
        solve(
            sandbox,
            [job(row, f"```python\n{row['prompt']}{row['canonical_solution']}```") for row in rows[::20]],
        )
        == [(True, "")] * 9
    )
    assert not any(passed for passed, _ in solve(sandbox, [job(row, "") for row in rows[::20]]))


# commands


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    small_folder(folder / "base", max_len=2048)
    with gzip.open(folder / "he.jsonl.gz", "wt") as f:
        for i in range(6):
            row = dict(
                task_id=f"T/{i}",
                prompt=f'def f{i}(x):\n    """Add {i}."""\n',
                entry_point=f"f{i}",
                test=f"def check(f):\n    assert f(1) == 1 + {i}\n",
            )
            f.write(json.dumps(row) + "\n")
    return folder


def command(*argv):
    eval.main([str(a) for a in argv])


def test_humaneval_in_two_phases(base, capsys, sandbox, monkeypatch):
    monkeypatch.chdir(base)
    args = [
        "humaneval",
        "--init=base",
        "--data=he.jsonl.gz",
        "--last=5",
        "--limit=4",
        "--max_new=4",
        "--template=plain",
    ]
    monkeypatch.setattr(eval, "run_program", None)  # nothing runs without --execute
    command(*args)
    words = "4 answers, none was executed: the same command with --execute runs them in a sandbox"
    assert words in capsys.readouterr().out
    monkeypatch.undo(), monkeypatch.chdir(base)
    answers, results = base / "out/humaneval-base.jsonl", base / "out/humaneval-base-results.jsonl"
    assert not results.exists() and len(answers.read_text().splitlines()) == 5
    head, *lines = map(json.loads, answers.read_text().splitlines())
    good = [
        "    return x + 1",
        "```python\ndef f2(x):\n    return x + 2\n```",
        "import os\nos._exit(0)",
        "return x + 5",
    ]  # rows 1 to 4
    lines = [dict(line, answer=good[line["row"]]) for line in lines]
    answers.write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)))
    command(*args, "--execute")
    out = capsys.readouterr().out.splitlines()[-1]
    assert "pass@1 50.00 % (2 of 4), 95 % interval 15.00 to 85.00 -> out/humaneval-base-results.jsonl" in out
    whole = results.read_text().splitlines()
    assert [
        json.loads(line)["passed"] for line in sorted(whole[1:], key=lambda line: json.loads(line)["row"])
    ] == [True, True, False, False]
    results.write_text("\n".join(whole[:3]) + "\n" + whole[3][:9])
    ran = []
    run = eval.run_program

    def counted(box, *job):
        ran.append(job)
        return run(box, *job)

    monkeypatch.setattr(eval, "run_program", counted)
    command(*args, "--execute")
    assert (
        len([job for job in ran if job[0]]) == 2
        and capsys.readouterr().out.splitlines()[-1] == out
        and len(results.read_text().splitlines()) == 5
    )
    answers.write_text(
        "".join(
            json.dumps(dict(line, answer="")) + "\n" if "answer" in line else json.dumps(line) + "\n"
            for line in (head, *lines)
        )
    )
    with pytest.raises(ValueError, match="was made with"):  # old verdicts are not those of other answers
        command(*args, "--execute")


def test_mbpp(base, capsys, sandbox, monkeypatch):
    monkeypatch.chdir(base)
    rows = [
        dict(
            text="Write double.",
            code="",
            task_id=1,
            test_setup_code="two = Two()",
            test_list=["assert double(3) == 6", "assert two.x == 2"],
        ),
        dict(
            text="Write triple.", code="", task_id=2, test_setup_code="", test_list=["assert triple(3) == 9"]
        ),
    ]
    (base / "mbpp.jsonl").write_text("\n".join(map(json.dumps, rows)))
    row = dict(
        prompt="Write root.",
        code="",
        task_id=3,
        test_imports=["import math"],
        test_list=["assert root(4) == math.sqrt(4)"],
    )
    (base / "sanitized.json").write_text(json.dumps([row]))
    args = [
        "mbpp",
        "--init=base",
        "--data=mbpp.jsonl",
        "--max_new=3",
    ]
    command(*args)
    path = base / "out/mbpp-base.jsonl"
    head, *lines = map(json.loads, path.read_text().splitlines())
    right = "class Two:\n    x = 2\ndef double(x):\n    return 2 * x\n"
    lines = [dict(line, answer=right if line["row"] == 0 else "x = 1") for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)))
    command(*args, "--execute")
    out = capsys.readouterr().out
    assert "pass@1 50.00 % (1 of 2)" in out
    command("mbpp", "--init=base", "--data=sanitized.json", "--max_new=3", "--out=clean")
    path = base / "out/clean.jsonl"
    head, line = map(json.loads, path.read_text().splitlines())
    path.write_text(
        "\n".join(map(json.dumps, (head, dict(line, answer="def root(x):\n    return x ** 0.5")))) + "\n"
    )
    command("mbpp", "--init=base", "--data=sanitized.json", "--max_new=3", "--out=clean", "--execute")
    assert (
        "pass@1 100.00 % (1 of 1)" in capsys.readouterr().out and (base / "out/clean-results.jsonl").exists()
    )


def test_mbpp_reference_solutions(sandbox, shared, base, monkeypatch):
    """A fixed sample of both forms (of all 974, and of the 427 sanitized, every one passes), through the command."""
    monkeypatch.chdir(base)
    for name in ("mbpp.jsonl", "sanitized-mbpp.json"):
        text = (shared / "mbpp" / name).read_text()
        rows = [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)
        sample = random.Random(0).sample(rows, 12) + [row for row in rows if row["task_id"] in (367, 927)]
        lines = "\n".join(map(json.dumps, sample))
        (base / name.replace("mbpp", "sample")).write_text(
            lines if name.endswith("l") else json.dumps(sample)
        )
        answers = [dict(row=i, answer=row["code"]) for i, row in enumerate(sample)]
        monkeypatch.setattr(eval.Subject, "answer", lambda *a, answers=answers, **k: ("out/x.jsonl", answers))
        shown = []
        monkeypatch.setattr(eval, "print_share", lambda what, right, path, shown=shown: shown.append(right))
        out = f"--out=reference-{len(sample)}-{name[:4]}"
        command("mbpp", "--init=base", f"--data={name.replace('mbpp', 'sample')}", "--execute", out)
        assert [bool(x) for x in shown[0]] == [True] * len(sample)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--max_new=0"], "--max_new=0: expected a number above 0"),
        (["--batch_size=0"], "--batch_size=0: expected"),
        (["--temperature=-1"], "--temperature=-1.0: expected a number at least 0"),
        (["--limit=-1"], "--limit=-1: expected"),
        (["--data=rows.jsonl"], "KeyError: 'prompt'.*expected HumanEval's fields prompt, entry_point, test"),
        (["--data=none.jsonl.gz"], "expected an existing"),
        (["--data=cut.jsonl.gz"], "cut.jsonl.gz: cannot be read .*expected rows in .jsonl"),
        (["--data=not.jsonl.gz"], "not.jsonl.gz: cannot be read .*expected rows in .jsonl"),
    ],
)
def test_bad_options(base, argv, words, monkeypatch):
    monkeypatch.chdir(base)
    (base / "rows.jsonl").write_text('{"q": "x"}\n')
    (base / "cut.jsonl.gz").write_bytes((base / "he.jsonl.gz").read_bytes()[:60])
    (base / "not.jsonl.gz").write_bytes(b"plain text")
    with pytest.raises(ValueError, match=words):
        command("humaneval", "--init=base", "--data=he.jsonl.gz", *argv)


def test_without_a_sandbox_nothing_runs(base, monkeypatch, capsys):
    """The answers are there, and the line says why none was executed."""
    monkeypatch.chdir(base)
    monkeypatch.setattr(eval, "sandbox_fault", lambda: "bwrap is not installed")
    monkeypatch.setattr(eval, "run_program", None)
    command("humaneval", "--init=base", "--data=he.jsonl.gz", "--execute", "--out=never", "--max_new=4")
    out = capsys.readouterr().out
    assert "none was executed: bwrap is not installed" in out
    assert len((base / "out/never.jsonl").read_text().splitlines()) == 7
    assert not (base / "out/never-results.jsonl").exists()
