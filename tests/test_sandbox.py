"Hostile programs: each is stopped in time, leaves nothing behind and harms nobody."

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import selfplay_nb.tasks.sandbox as sandbox
from selfplay_nb.tasks.sandbox import TIERS, Result, SandboxUnavailable, missing, run, run_many

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


@pytest.fixture(params=TIERS)
def tier(request):
    if lacks := missing(request.param):
        pytest.skip(lacks)
    return request.param


@pytest.fixture
def strong():
    if lacks := missing("strong"):
        pytest.skip(lacks)
    return "strong"


def alive():
    "Processes of this machine, zombies apart: pid to its start, parent and name."
    found = {}
    for p in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{p}/stat").read_text()
        except OSError:
            continue
        name, rest = stat[stat.index("(") :].rsplit(")", 1)
        rest = rest.split()
        if rest[0] not in "ZX":
            found[p, rest[19]] = name, rest[1]
    return found


@pytest.fixture(autouse=True)
def own_folder(tmp_path_factory, monkeypatch):
    "A place for temporary files that no other test uses at the same time."
    folder = str(tmp_path_factory.mktemp("own"))
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.setattr(tempfile, "tempdir", folder)


def ours():
    """Processes that come from this one, or run in its own folder: supervisors, and the programs that they
    run.
    """
    parents = {pid: parent for (pid, _), (_, parent) in alive().items()}
    found = []
    for pid in parents:
        line = [pid]
        while line[-1] in parents:
            line.append(parents[line[-1]])
        try:
            there = os.readlink(f"/proc/{pid}/cwd").startswith(tempfile.gettempdir())
        except OSError:
            there = False
        if there or str(os.getpid()) in line[1:]:
            found.append(int(pid))
    return found


DAEMON = """import os, sys, time
if os.fork() == 0:
    os.setsid()
    pid = os.fork()
    if pid:
        print(pid, flush=True)   # not the daemon itself, which may be killed before it prints
        os._exit(0)
    for fd in 0, 1, 2: os.close(fd)
    while True: time.sleep(1)
os.wait()
%s"""
HOSTILE = {  # name: (program, statuses that are right)
    "endless loop": ("while True: pass", {"timeout"}),
    "deaf to signals": (
        (
            "import signal\nfor s in 1, 2, 3, 10, 12, 15, 24, 25: signal.signal(s, signal.SIG_IGN)\nwhile"
            " True: pass"
        ),
        {"timeout"},
    ),
    "swallows exceptions": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        {"timeout"},
    ),
    "fork bomb": ("import os\nwhile True: os.fork()", {"killed", "timeout", "error"}),
    "patient fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        {"killed", "timeout"},
    ),
    "fork bomb with sessions": (
        "import os\nwhile True:\n    try:\n        if os.fork() == 0: os.setsid()\n    except OSError: pass",
        {"killed", "timeout"},
    ),
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
        {"error", "memory", "timeout", "killed"},
    ),
    # a busy machine hands out pages slowly
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(10**7))", {"memory", "timeout"}),
    "memory at once": ("x = bytearray(10**10)", {"memory"}),
    "shared memory bomb": (
        (
            "import os, time\nfor _ in range(4):\n    if os.fork() == 0: break\nx ="
            " bytearray(40*2**20)\ntime.sleep(9)"
        ),
        {"memory", "timeout"},
    ),
    "flood": ("while True: print('x'*10**4)", {"output"}),
    "flood of errors": ("import sys\nwhile True: sys.stderr.write('x'*10**4)", {"output"}),
    "flood of a child": (
        "import os\nif os.fork() == 0:\n    while True: os.write(2, b'x'*1000)\nos.wait()",
        {"output"},
    ),
    "one big line": ("print('x'*10**7)", {"output"}),
    "recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\nf = lambda n: f(n+1)\nf(0)",
        {"memory", "killed", "error", "timeout"},
    ),
    "closed and asleep": ("import os, time\nfor fd in 0, 1, 2: os.close(fd)\ntime.sleep(99)", {"timeout"}),
    "deletes its folder": (
        "import os, shutil\nd = os.getcwd()\nos.chdir('/')\nshutil.rmtree(d)\nwhile True: pass",
        {"timeout", "error"},
    ),
    "locks its folder": (
        "import os\nos.makedirs('a/b')\nos.chmod('a', 0)\nos.chmod('.', 0)",
        {"ok", "error"},
    ),
    "big file": ("with open('big', 'wb') as f:\n    while True: f.write(bytes(10**6))", {"error"}),
    "many open files": ("x = []\nwhile True: x.append(open('main.py'))", {"error"}),
    "daemon": (DAEMON % "", {"ok"}),
    "daemon, and waits": (DAEMON % "time.sleep(99)", {"timeout"}),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)", {"error", "killed"}),
    "stops its parent": ("import os\nos.kill(os.getppid(), 19)\nwhile True: pass", {"error", "timeout"}),
    "raises its limits": ("import resource as r\nr.setrlimit(r.RLIMIT_FSIZE, (2**40, 2**40))", {"error"}),
    "reads for ever": (
        "import sys\nassert sys.stdin.read() == ''\nopen('/dev/stdin').read()\nwhile True: pass",
        {"timeout", "error"},
    ),
    "segfault": ("import ctypes\nctypes.string_at(0)", {"killed"}),
}
KERNEL = "kills its parent", "stops its parent"  # signals stay inside only where the kernel can scope them


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name, tier, tmp_path):
    program, right = HOSTILE[name]
    if name in KERNEL and missing("strong"):
        pytest.skip("this kernel cannot scope signals")
    before, threads = set(ours()), threading.active_count()
    # a second, and more where the machine is so busy that nothing starts in time
    slack = max(1, 10 * run("pass", tier=tier).seconds)
    seconds = 1 if "timeout" in right else 4  # most of the latter end at once
    r = run(program, tier=tier, seconds=seconds, memory=100)
    assert r.status in right, repr(r)
    assert r.seconds < seconds + slack
    assert len(r.stdout) + len(r.stderr) <= 2 * 64_000
    if "daemon" in name:
        assert not os.path.exists(f"/proc/{int(r.stdout)}")
    assert set(ours()) <= before, "a process is left"
    assert threading.active_count() == threads
    assert os.listdir(tempfile.gettempdir()) == []


def test_results(tier):
    r = run(
        "import sys\nprint(sys.stdin.read().upper())\nprint('why', file=sys.stderr)\nsys.exit(3)",
        tier=tier,
        stdin="héllo",
    )
    assert (r.status, r.code, r.stdout, r.stderr, r.ok) == ("error", 3, "HÉLLO\n", "why\n", False)
    assert "exit code 3" in repr(r) and "HÉLLO" in repr(r) and "<pre " in r._repr_html_()
    assert "<script>" not in run("print('<script>')", tier=tier)._repr_html_()
    assert (
        run("import os; print(dict(os.environ), len(os.listdir()))", tier=tier).stdout.replace(
            "'LC_CTYPE': 'C.UTF-8'", ""
        )
        == "{} 1\n"
    )
    assert run("print(open(0).read())", tier=tier).stdout == "\n"
    assert run("import os; os.write(1, bytes([255]))", tier=tier).stdout == "\ufffd"
    bad = run("1/0", tier=tier)
    assert "ZeroDivisionError" in bad.stderr and "sandbox-" not in bad.stderr, "no paths of the machine"
    assert run("import numpy", tier=tier).status == "error", "the standard library alone"


def test_output_is_cut_while_it_runs(tier):
    r = run("while True: print('x'*1000)", tier=tier, seconds=9, output=5000)
    assert r.status == "output" and r.seconds < 5 and 0 < len(r.stdout) <= 5000
    assert len(run("print('x'*4000)", tier=tier, output=5000).stdout) == 4001


def test_many_keep_their_order(tier):
    seen = []
    rs = run_many(
        [
            *(f"import time; time.sleep({0.3 - i / 10}); print({i})" for i in range(3)),
            {"program": "while True: pass", "seconds": 0.5},
        ],
        tier=tier,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (
        [r.stdout for r in rs] == ["0\n", "1\n", "2\n", ""]
        and rs[3].status == "timeout"
        and seen == [(i, 4) for i in range(1, 5)]
    )


def test_strong_reads_nothing_outside(strong, tmp_path):
    secret = tmp_path / "answers.txt"
    secret.write_text("42")
    for path in (
        "/etc/passwd",
        secret,
        "/proc/1/environ",
        f"/proc/{os.getpid()}/environ",
        f"/proc/{os.getpid()}/mem",
        "/root",
        tmp_path,
        Path(__file__),
    ):
        r = run(
            f"import os\np = {str(path)!r}\nprint(os.listdir(p) if os.path.isdir(p) else open(p,"
            " 'rb').read(9))",
            tier=strong,
        )
        assert (
            r.status == "error"
            and not r.stdout
            and ("PermissionError" in r.stderr or "FileNotFoundError" in r.stderr)
        ), path
    r = run(f"import os\nos.symlink({str(secret)!r}, 'x')\nprint(open('x').read())", tier=strong)
    assert "PermissionError" in r.stderr and not r.stdout
    r = run(f"import os\nos.link({str(secret)!r}, 'x')\nprint(open('x').read())", tier=strong)
    assert r.status == "error" and not r.stdout


def test_strong_writes_nothing_outside(strong, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    for program in (
        f"open({str(mine)!r}, 'w').write('theirs')",
        f"import os; os.remove({str(mine)!r})",
        f"import os; os.rename({str(mine)!r}, 'x')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
        f"import os; os.chmod({str(mine)!r}, 0)",
        f"import os; os.chown({str(mine)!r}, 1, 1)",
        f"import os; os.utime({str(mine)!r}, (1, 1))",
        f"import os; os.setxattr({str(mine)!r}, 'user.x', b'y')",
        f"import os; os.truncate({str(mine)!r}, 0)",
    ):
        before = mine.stat()
        assert run(program, tier=strong).status == "error", program
        after = mine.stat()
        assert (after.st_mode, after.st_uid, after.st_mtime, after.st_ctime) == (
            before.st_mode,
            before.st_uid,
            before.st_mtime,
            before.st_ctime,
        ), program
    assert mine.read_text() == "mine" and list(tmp_path.iterdir()) == [mine]
    assert (
        run("open('x', 'w').write('y'); print(open('x').read())", tier=strong).stdout == "y\n"
    ), "its own folder is its own"


def test_strong_has_no_network(strong):
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        server.settimeout(0.2)
        udp.bind(("127.0.0.1", 0))
        udp.settimeout(0.2)
        port = server.getsockname()[1]
        connect = (
            f"import socket\ns = socket.create_connection(('127.0.0.1', {port}), timeout=1)\ns.sendall(b'x')"
        )
        send = (
            "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.sendto(b'x',"
            f" ('127.0.0.1', {udp.getsockname()[1]}))"
        )
        assert run(connect, tier=strong).status == run(send, tier=strong).status == "error"
        for s in server.accept, lambda: udp.recv(9):
            with pytest.raises(TimeoutError):
                s()
        assert run("import socket; socket.create_server(('127.0.0.1', 0))", tier=strong).status == "error"


def test_strong_cannot_signal_us(strong):
    child = subprocess.Popen(["sleep", "30"])
    try:
        for target in child.pid, os.getpid(), -1:
            run(
                f"import os; os.kill({target}, 10 if {target} == {os.getpid()} else 9)",
                tier=strong,
                seconds=1,
            )
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


KERNEL_OF = r"""
import ctypes, struct
from selfplay_nb.tasks.code import check_code
from selfplay_nb.tasks.sandbox import SandboxUnavailable, run
libc = ctypes.CDLL(None, use_errno=True)
assert not libc.prctl(38, 1, 0, 0, 0)
class Filter(ctypes.Structure): _fields_ = [("n", ctypes.c_ushort), ("code", ctypes.c_char_p)]
def refuses(number, error, first=None):
    "From now on the kernel answers system call `number` (with this first argument, if given) by an error."
    argument = [] if first is None else [(0x20, 0, 0, 16), (0x15, 0, 1, first)]
    code = [(0x20, 0, 0, 0), (0x15, 0, len(argument) + 1, number), *argument]
    code += [(6, 0, 0, 0x50000 | error), (6, 0, 0, 0x7FFF0000)]
    code = b"".join(struct.pack("=HBBI", *c) for c in code)
    assert not libc.prctl(22, 2, ctypes.byref(Filter(len(code)//8, code)), 0, 0)
def enclosed():
    "One more Landlock domain; the kernel allows 16, one inside the other."
    rules = libc.syscall(444, struct.pack("=QQQ", 0, 0, 3), 24, 0)
    assert rules >= 0 and not libc.syscall(446, rules, 0)
def tried(tier):
    try: return run("print('ran')", tier=tier).stdout.strip()
    except SandboxUnavailable as e: return f"unavailable: {e}"
TESTS = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
PLUS = "def add(a, b): return a + b"
LOOK = "import os\ndef add(a, b): return open(f'/proc/{os.getppid()}/NAME', 'rb').read(9) and 3"
"""


def on_a_kernel(program):
    "What a Python prints whose kernel refuses something, as an older one or a container would."
    done = subprocess.run([sys.executable, "-c", KERNEL_OF + program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


PRCTL = {"x86_64": 157, "aarch64": 167}.get(os.uname().machine)


def test_never_weaker(strong):
    """A kernel without Landlock, as before 5.13: no strong tier, and nothing has run; the plain one is there,
    and shows the tests to nobody.
    """
    said = on_a_kernel("""refuses(444, 38)
print(tried("strong"))
print(tried("process"))
for name in "mem", "environ", "maps", "fd/1": print(check_code(LOOK.replace("NAME", name), "add", TESTS, \
tier="process", seconds=10))
print(check_code(PLUS, "add", TESTS, tier="process", seconds=10))""").splitlines()
    assert (
        said[0].startswith("unavailable")
        and "Landlock" in said[0]
        and "tier='process' is weaker" in said[0]
        and said[1] == "ran"
    )
    assert said[2:6] == ["Verdict(0 of 1 tests passed)"] * 4 and said[6:] == ["Verdict(1 of 1 tests passed)"]


@pytest.mark.parametrize(
    "what, refuse",
    [
        ("Landlock", "for _ in range(16): enclosed()"),
        ("seccomp", f"refuses({PRCTL}, 1, 22)"),
        ("no new privileges", f"refuses({PRCTL}, 22, 38)"),
        ("PR_SET_CHILD_SUBREAPER", f"refuses({PRCTL}, 22, 36)"),
        ("PR_SET_DUMPABLE", f"refuses({PRCTL}, 1, 4)"),
    ],
)
def test_a_refused_protection_is_an_error(strong, what, refuse):
    said = on_a_kernel(f"{refuse}\nfor tier in 'strong', 'process': print(tried(tier))").splitlines()
    assert len(said) == 2
    for line in said:
        assert line.startswith("unavailable") and what in line, said


def test_tests_that_cannot_be_kept_apart_are_an_error(strong):
    "The sandbox can be had, and the second enclosure inside of it cannot: no verdict."
    said = on_a_kernel("""for _ in range(15): enclosed()
print(tried("strong"))
try: print(check_code(PLUS, "add", TESTS, seconds=10))
except SandboxUnavailable as e: print(e)""")
    assert said.startswith("ran\nThe tests' process could not be kept apart"), said


def test_elsewhere(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    missing.cache_clear()
    try:
        with pytest.raises(SandboxUnavailable, match="needs Linux; this is darwin"):
            run("print(1)", tier="process")
    finally:
        missing.cache_clear()


def test_arguments():
    for bad in (
        dict(tier="weak"),
        dict(seconds=0),
        dict(seconds=float("inf")),
        dict(memory=-1),
        dict(processes=1.5),
        dict(output=0),
    ):
        with pytest.raises(ValueError, match="expected"):
            run("print(1)", **{"tier": "process"} | bad)
    with pytest.raises(TypeError, match="expected Python source"):
        run(["print(1)"], tier="process")
    with pytest.raises(ValueError, match="workers"):
        run_many(["1"], workers=0)
    assert run_many([]) == [] and isinstance(Result("ok", 0, "", "", 0.1).ok, bool)


def test_an_interrupted_caller_leaves_nothing():
    program = "import os\nif os.fork() == 0: os.setsid()\nwhile True: pass"
    code = (
        f"from selfplay_nb.tasks.sandbox import run\nprint('go', flush=True)\nrun({program!r},"
        " tier='process', seconds=30)"
    )
    before = set(ours())
    for kill in "terminate", "kill":
        p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        p.stdout.readline()
        # the caller, its supervisor, the program and its child
        wait_for(lambda: len(set(ours()) - before) > 3)
        started = set(ours()) - before
        getattr(p, kill)()
        p.wait()
        p.stdout.close()
        wait_for(lambda: not started & {int(pid) for pid, _ in alive()} and set(ours()) <= before)


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
